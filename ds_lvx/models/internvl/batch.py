"""InternVL's batches: tiles, of images and of videos' frames, that all have as many tokens.

A unit is a tile: the tower attends within one. Which tiles make an image is in neither batch
nor model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_lvx.models.concatenated.batch import Unit
from ds_lvx.models.visual import PIXELS


def tile_tokens(config: Any) -> int:
    """Visual tokens of a tile: its patches, of which a square of some becomes one.

    Raises:
        NotImplementedError: tiles that are no squares of whole tokens.
    """
    (height, width), patch = config.vision_config.image_size, config.vision_config.patch_size
    merged = round(1 / config.downsample_ratio)
    rows, columns = height // patch[0], width // patch[1]
    if rows != columns or rows % merged:
        raise NotImplementedError(
            f"got a vision_config with tiles of {rows} x {columns} patches; expected squares whose "
            f"side is a multiple of {merged}, as transformers' InternVL takes them"
        )
    tokens: int = (rows // merged) ** 2
    return tokens


def units(ids: Tensor, config: Any) -> list[Unit]:
    """See `ds_lvx.models.concatenated.family.Concatenated.units`."""
    each = tile_tokens(config)
    found: list[Unit] = []
    for row, visual in enumerate((ids == config.image_token_id).sum(dim=1).tolist()):
        count, more = divmod(visual, each)
        if more:
            raise ValueError(
                f"got {visual} image tokens in sample {row}; expected a multiple of {each}, those "
                "of a tile: use the processor that belongs to the model, and cut no text in the "
                "midst of an image"
            )
        found += [Unit(row, each, PIXELS, 1) for _ in range(count)]
    return found


def check_pixels(pixels: Tensor, config: Any) -> None:
    """Refuse tiles of another shape than `tile_tokens` counts.

    Raises:
        ValueError: says which.
    """
    wanted = (config.vision_config.num_channels, *config.vision_config.image_size)
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != wanted:
        raise ValueError(
            f"got {PIXELS} {tuple(pixels.shape)}; expected (tiles, {', '.join(map(str, wanted))}): "
            "use the processor that belongs to the model"
        )


def arrange(units: Sequence[Unit], rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tiles, one after the other."""
    return {PIXELS: torch.cat([*rows])}


def blank(config: Any) -> dict[str, Tensor]:
    """One blank tile."""
    vision = config.vision_config
    return {PIXELS: torch.zeros(1, vision.num_channels, *vision.image_size)}
