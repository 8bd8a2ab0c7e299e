"""VideoLLaMA 3's batches: grids of patches, how many a token merges, and which tokens are kept.

A unit is an image or a frame: the tower attends within one. Of a frame only those tokens stand in
the text that the processor kept; what hardly differs from the frame before is left out. `about` of
a unit is h, w and m, and where not all of its tokens are kept, the numbers of those that are.
Legend: ``t, h, w`` patches of an image or a video, ``m`` patches of a token by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ds_lvx.models.concatenated.batch import Unit
from ds_lvx.models.qwen2_5_vl import batch as qwen
from ds_lvx.models.qwen2_5_vl import tower
from ds_lvx.models.visual import PIXELS

MERGES, VIDEO_MERGES = "image_merge_sizes", "video_merge_sizes"
MASK = "video_compression_mask"
KEPT = "kept_tokens"
"""Which tokens of all that a rank's tower makes stand in the text, int64; without it all do."""
_SIDES = 3  # numbers of `about` that every unit has
_VIDEO = 2

Size: TypeAlias = tuple[int, int, int, int]
"""t, h, w, m"""


def units(batch: Mapping[str, Any], ids: Tensor, config: Any) -> list[Unit]:
    """See `ds_lvx.models.concatenated.family.Concatenated.units`."""
    qwen.check_patches(batch, width=patch_width(config))
    media = {}
    for kind, (source, _) in qwen.SOURCES.items():
        sizes = _sizes(batch, kind)
        masks = _masks(batch, sizes) if kind == _VIDEO else [None] * len(sizes)
        media[kind] = map(partial(_frames, source), sizes, masks)
    return qwen.in_order(qwen.token_types(ids, config), media)


def patch_width(config: Any) -> int:
    """Numbers of a patch."""
    return int(config.vision_config.num_channels * config.vision_config.patch_size**2)


def _sizes(batch: Mapping[str, Any], kind: int) -> list[Size]:
    """Of each image, or of each video."""
    key, of_merges = qwen.SOURCES[kind][1], VIDEO_MERGES if kind == _VIDEO else MERGES
    grids, given = qwen.grids(batch, key), batch.get(of_merges)
    merges: list[int] = given.flatten().tolist() if isinstance(given, Tensor) else []
    if len(merges) != len(grids) or min(merges, default=1) < 1:
        got = merges if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(
            f"got {of_merges} {got} for {len(grids)} rows of {key}; expected a tensor with a "
            "number from 1 on for each, the patches of a token by side: use the model's own "
            "processor"
        )
    for grid, merge in zip(grids, merges, strict=True):
        qwen.check_grid(key, grid, merge)
    return [(t, h, w, merge) for (t, h, w), merge in zip(grids, merges, strict=True)]


def _masks(batch: Mapping[str, Any], sizes: Sequence[Size]) -> Sequence[Tensor | None]:
    """Of each video the tokens that are kept, bool ``[t, h w / m^2]``; None: all are."""
    mask = batch.get(MASK)
    if mask is None:
        return [None] * len(sizes)
    counts = [t * h * w // m**2 for t, h, w, m in sizes]
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.numel() != sum(counts):
        got = (
            f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        )
        raise ValueError(
            f"got {MASK} {got}; expected bool ({sum(counts)},): of each token that the videos "
            "have, whether it stands in the text, those of the whole batch"
        )
    parts = mask.cpu().flatten().split(counts) if counts else ()
    masks = [part.unflatten(0, (t, -1)) for part, (t, *_) in zip(parts, sizes, strict=True)]
    if not all(bool(each.any(dim=1).all()) for each in masks):
        raise ValueError(
            f"got a {MASK} that keeps no token of a frame; expected one of each frame or more, as "
            "the model's processor keeps them"
        )
    return masks


def _frames(source: str, size: Size, mask: Tensor | None) -> list[Unit]:
    """The units of an image or a video."""
    t, *sides = size
    h, w, m = sides
    whole = Unit(0, h * w // m**2, source, h * w, (h, w, m))
    if mask is None:
        return [whole] * t
    kept = [row.nonzero()[:, 0].tolist() for row in mask]
    return [
        whole if len(n) == whole.tokens else replace(whole, tokens=len(n), about=(h, w, m, *n))
        for n in kept
    ]


def arrange(units: Sequence[Unit], rows: Sequence[Tensor]) -> dict[str, Any]:
    """Units as images of one video: consecutive ones of a size share a row of the grid."""
    sides = groupby(unit.about[:_SIDES] for unit in units)
    made = {PIXELS: torch.cat([*rows]), **_of([(len([*group]), *size) for size, group in sides])}
    if any(len(unit.about) > _SIDES for unit in units):
        made[KEPT] = torch.cat(_numbers(units))
    return made


def _numbers(units: Sequence[Unit]) -> list[Tensor]:
    """Of each unit, which tokens of all that the tower makes stand in the text."""
    found, first = [], 0
    for unit in units:
        h, w, m = unit.about[:_SIDES]
        count, some = h * w // m**2, unit.about[_SIDES:]
        found.append(first + (torch.tensor(some) if some else torch.arange(count)))
        first += count
    return found


def _of(sizes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """What the tower takes of pictures of some `Size` beside their pixels."""
    *grid, merges = zip(*sizes, strict=True)
    return tower.arguments([*zip(*grid, strict=True)], partial(_follow, merges=merges))


def _follow(grid: Tensor, *, merges: tuple[int, ...]) -> dict[str, Any]:
    """See `ds_lvx.models.qwen2_5_vl.tower.Follow`."""
    return {**tower.whole(grid, merge=torch.tensor(merges)), "merge_sizes": merges}


def blank(config: Any) -> dict[str, Any]:
    """One blank image, as small as there is."""
    return {PIXELS: torch.zeros(1, patch_width(config)), **_of([(1, 1, 1, 1)])}
