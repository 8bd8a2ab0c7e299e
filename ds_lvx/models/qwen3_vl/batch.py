"""Qwen3-VL's batches: as Qwen2.5-VL's, but each temporal patch of a video stands by itself.

Text says its time and parts it from the next, so that a run of placeholders is one image or one
temporal patch. Legend: ``t, h, w`` patches of an image or a video, ``m`` merged ones by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from torch import Tensor

from ds_lvx.models.concatenated.batch import Unit
from ds_lvx.models.qwen2_5_vl.batch import SOURCES, grids_of

_VIDEO = 2


def units(batch: Mapping[str, Any], types: Tensor, config: Any) -> list[Unit]:
    """See `ds_lvx.models.concatenated.family.Concatenated.units`: one for each run of a type."""
    merge, runs = int(config.vision_config.spatial_merge_size), _runs(types)
    left = {kind: _sides(kind, [*grids]) for kind, grids in grids_of(batch, config).items()}
    _check_counts(runs, left)
    sides = {kind: iter(each) for kind, each in left.items()}
    found: list[Unit] = []
    for row, kind, tokens in runs:
        source, key = SOURCES[kind]
        h, w = next(sides[kind])
        if tokens != h * w // merge**2:
            raise ValueError(
                f"got {tokens} tokens one after the other in sample {row} for an image or a frame "
                f"of {key} that makes {h * w // merge**2}; expected as many: use the processor "
                "that belongs to the model, and cut no text in the midst of an image or a frame"
            )
        found.append(Unit(row, tokens, source, h * w, (h, w)))
    return found


def _runs(types: Tensor) -> list[tuple[int, int, int]]:
    """Row, token type and tokens of every run of an image's or a video's tokens."""
    return [
        (row, kind, len(list(run)))
        for row, each in enumerate(types.tolist())
        for kind, run in groupby(each)
        if kind > 0
    ]


def _sides(kind: int, grids: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """``h, w`` of every run: of an image, or of a frame of a video."""
    key = SOURCES[kind][1]
    for grid in grids:
        if kind != _VIDEO and grid[0] != 1:
            raise ValueError(
                f"got {[*grid]} in {key}; expected 1 frame of an image: videos belong into "
                f"{SOURCES[_VIDEO][1]}"
            )
    return [(h, w) for t, h, w in grids for _ in range(t)]


def _check_counts(
    runs: Sequence[tuple[int, int, int]], sides: Mapping[int, Sequence[tuple[int, int]]]
) -> None:
    for kind, (_, key) in SOURCES.items():
        found, wanted = sum(each == kind for _, each, _ in runs), len(sides[kind])
        if found != wanted:
            what = "frames of videos (two pictures each)" if kind == _VIDEO else "images"
            raise ValueError(
                f"got {found} {what} in input_ids, text between them, and {key} of {wanted}; "
                "expected as many, those of the whole batch: use the model's own processor, which "
                "writes the time of each frame, and cut none of its tokens"
            )
