"""Gemma 3's batches: images that all have as many tokens, which see each other in both directions.

What sees each other is in ``token_type_ids``, which the processor makes: a run of ones. Without
them a token of an image sees none behind it, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_lvx.models.concatenated.batch import Unit
from ds_lvx.models.concatenated.seen import ends_of_runs, token_types
from ds_lvx.models.visual import PIXELS

TYPES = "token_type_ids"


def image_tokens(config: Any) -> int:
    """Visual tokens of an image.

    Raises:
        NotImplementedError: no square of whole patches becomes one.
    """
    vision, tokens = config.vision_config, int(config.mm_tokens_per_image)
    patches, side = vision.image_size // vision.patch_size, round(tokens**0.5)
    if side**2 != tokens or patches % side:
        raise NotImplementedError(
            f"got a config with {tokens} tokens for an image of {patches} x {patches} patches; "
            "expected a square number whose side divides theirs, as transformers' projector pools"
        )
    return tokens


def units(ids: Tensor, config: Any) -> list[Unit]:
    """See `ds_lvx.models.concatenated.family.Concatenated.units`."""
    each = image_tokens(config)
    found: list[Unit] = []
    for row, visual in enumerate((ids == config.image_token_id).sum(dim=1).tolist()):
        count, more = divmod(visual, each)
        if more:
            raise ValueError(
                f"got {visual} image tokens in sample {row}; expected a multiple of {each}, those "
                "of an image: use the processor that belongs to the model, and cut no text in the "
                "midst of an image"
            )
        found += [Unit(row, each, PIXELS, 1) for _ in range(count)]
    return found


def ends(batch: Mapping[str, Any], ids: Tensor) -> Tensor | None:
    """int64 ``[B, T]``, one past the last place that each token sees; None: none behind it.

    Args:
        batch: what the caller gave.
        ids: int64 ``[B, T]``, on the CPU.

    Raises:
        ValueError: ``token_type_ids`` of another shape than ``input_ids``.

    Source: transformers, ``gemma3.get_block_sequence_ids_for_mask``.
    """
    types = token_types(batch, TYPES, ids)
    return None if types is None else ends_of_runs(types == 1)


def check_pixels(pixels: Tensor, config: Any) -> None:
    """Refuse images of another shape than the tower takes.

    Raises:
        ValueError: says which.
    """
    vision = config.vision_config
    wanted = (vision.num_channels, vision.image_size, vision.image_size)
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != wanted:
        raise ValueError(
            f"got {PIXELS} {tuple(pixels.shape)}; expected (images, "
            f"{', '.join(map(str, wanted))}): use the processor that belongs to the model"
        )


def arrange(units: Sequence[Unit], rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """The images, one after the other."""
    return {PIXELS: torch.cat([*rows])}


def blank(config: Any) -> dict[str, Tensor]:
    """One blank image."""
    vision = config.vision_config
    side = vision.image_size
    return {PIXELS: torch.zeros(1, vision.num_channels, side, side)}
