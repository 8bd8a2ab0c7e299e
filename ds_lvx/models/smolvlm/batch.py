"""SmolVLM's and Idefics3's batches: tiles, of images and of videos' frames, all of as many tokens.

A unit is a tile: the tower attends within one. Their processors stack the tiles of a sample, and
pad them with tiles of zeros, which the models drop by looking for zeros; so is it done here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_lvx.models.concatenated.batch import Unit
from ds_lvx.models.visual import PIXELS

MASK = "pixel_attention_mask"


def tile_tokens(config: Any) -> int:
    """Visual tokens of a tile: its patches, of which a square of some becomes one.

    Raises:
        NotImplementedError: tiles that are no squares of whole tokens.
    """
    vision, merged = config.vision_config, config.scale_factor
    side = vision.image_size // vision.patch_size
    if side % merged:
        raise NotImplementedError(
            f"got a vision_config with tiles of {side} x {side} patches; expected a multiple of "
            f"scale_factor {merged}, as the published models have it"
        )
    return int(side // merged) ** 2


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


def tiles(pixels: Tensor, mask: Any, config: Any) -> Tensor:
    """The tiles that are no padding, one after the other.

    Args:
        pixels: ``[B, tiles, channels, height, width]``.
        mask: `MASK` ``[B, tiles, height, width]``, or None.
        config: of the model.

    Returns:
        ``[tiles of all, channels, height, width]``.

    Raises:
        ValueError: other shapes, or a mask that hides a part of a tile.
    """
    shape = _shape(config)
    if pixels.ndim != 5 or tuple(pixels.shape[2:]) != shape:
        raise ValueError(
            f"got {PIXELS} {tuple(pixels.shape)}; expected (samples, tiles, "
            f"{', '.join(map(str, shape))}): use the processor that belongs to the model"
        )
    flat = pixels.flatten(0, 1)
    there = flat.ne(0).flatten(1).any(dim=1)
    if mask is not None:
        wanted = (*pixels.shape[:2], *pixels.shape[3:])
        if tuple(mask.shape) != wanted or not bool(mask.flatten(0, 1)[there].all()):
            raise ValueError(
                f"got {MASK} {tuple(mask.shape)} beside {PIXELS} {tuple(pixels.shape)}; expected "
                f"{wanted}, of which no tile is hidden in part: let the processor resize images to "
                "whole tiles, as it does by default"
            )
    return flat[there]


def arrange(units: Sequence[Unit], rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tiles, one after the other."""
    return {PIXELS: torch.cat([*rows])}


def blank(config: Any) -> dict[str, Tensor]:
    """One blank tile."""
    return {PIXELS: torch.zeros(1, *_shape(config))}


def _shape(config: Any) -> tuple[int, int, int]:
    vision = config.vision_config
    return vision.num_channels, vision.image_size, vision.image_size
