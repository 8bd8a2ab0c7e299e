"""Qwen2.5-VL's batches: grids of patches, and positions of three axes.

A unit is an image or a temporal patch of a video (two frames): the tower attends within one, by
windows and whole. Legend: ``t, h, w`` patches of an image or a video, ``m`` merged ones by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ds_lvx.models.concatenated.batch import Unit
from ds_lvx.models.qwen2_5_vl import tower
from ds_lvx.models.text import Text
from ds_lvx.models.visual import PIXELS

VIDEO_PIXELS = "pixel_values_videos"
GRID, VIDEO_GRID = tower.GRID, "video_grid_thw"
SECONDS, TYPES = "second_per_grid_ts", "mm_token_type_ids"
SOURCES = {1: (PIXELS, GRID), 2: (VIDEO_PIXELS, VIDEO_GRID)}
"""By token type, as the processor numbers them: where pixels and grids are."""


def token_types(ids: Tensor, config: Any) -> Tensor:
    """int64 ``[B, T]``: 1 for an image's tokens, 2 for a video's, 0 for text."""
    image, video = ids == config.image_token_id, ids == config.video_token_id
    return image.long() + 2 * video.long()


def check_types(batch: Mapping[str, Any], types: Tensor) -> None:
    """Those that a batch has have to be those of its tokens."""
    given = batch.get(TYPES)
    if given is not None and not torch.equal(given.cpu().long(), types):
        raise ValueError(
            f"got {TYPES} that are not those of input_ids; expected 1 at the tokens of images, 2 "
            "at those of videos, and 0: leave them out, or use the model's own processor"
        )


def units(batch: Mapping[str, Any], types: Tensor, config: Any) -> list[Unit]:
    """See `ds_lvx.models.concatenated.family.Concatenated.units`; of the types of its tokens."""
    merge = int(config.vision_config.spatial_merge_size)
    media = {
        kind: map(partial(_frames, SOURCES[kind][0], merge), grids)
        for kind, grids in grids_of(batch, config).items()
    }
    return in_order(types, media)


def in_order(types: Tensor, media: Mapping[int, Iterator[Sequence[Unit]]]) -> list[Unit]:
    """The units of a batch, each in the row that has its tokens.

    Args:
        types: of the tokens, ``[B, T]``.
        media: by type the units of each image, or of each video, whatever their rows say.

    Raises:
        ValueError: other tokens than they have.
    """
    found: list[Unit] = []
    for row, each in enumerate(types):
        tokens = each[each > 0].tolist()
        while tokens:
            kind = tokens[0]
            made = next(media[kind], None)
            if made is None:
                raise ValueError(
                    f"got tokens of an image or a video in sample {row} without a row of "
                    f"{SOURCES[kind][1]}; expected a row for each, those of the whole batch, also "
                    "where frames are local"
                )
            count = sum(unit.tokens for unit in made)
            if tokens[:count] != [kind] * count:
                here = next((n for n, other in enumerate(tokens) if other != kind), len(tokens))
                raise ValueError(
                    f"got {here} tokens in sample {row} for a row of {SOURCES[kind][1]} that "
                    f"makes {count}; expected as many: use the processor that belongs to the "
                    "model, and cut no text in the midst of an image or a video"
                )
            found += [replace(unit, row=row) for unit in made]
            del tokens[:count]
    for kind, left in media.items():
        more = len(list(left))
        if more > 0:
            key = SOURCES[kind][1]
            raise ValueError(
                f"got {key} with {more} more rows than there are images or videos in input_ids; "
                "expected the whole text: cut none of its image and video tokens"
            )
    return found


def _frames(source: str, merge: int, grid: Sequence[int]) -> list[Unit]:
    """The units of an image or a video."""
    t, h, w = grid
    return [Unit(0, h * w // merge**2, source, h * w, (h, w))] * t


def grids_of(batch: Mapping[str, Any], config: Any) -> dict[int, Iterator[list[int]]]:
    """``t, h, w`` of the images and of the videos of a batch, by token type; its patches fit."""
    check_patches(batch, width=patch_width(config))
    merge = int(config.vision_config.spatial_merge_size)
    made = {kind: grids(batch, key) for kind, (_, key) in SOURCES.items()}
    for kind, each in made.items():
        for grid in each:
            check_grid(SOURCES[kind][1], grid, merge)
    return {kind: iter(each) for kind, each in made.items()}


def check_patches(batch: Mapping[str, Any], *, width: int) -> None:
    """Refuse patches that have not so many numbers.

    Raises:
        ValueError: says which.
    """
    for source, _ in SOURCES.values():
        patches = batch.get(source)
        if not isinstance(patches, Tensor) or (patches.ndim == 2 and patches.shape[1] == width):
            continue
        raise ValueError(
            f"got {source} {tuple(patches.shape)}; expected (patches, {width}): use the processor "
            "that belongs to the model"
        )


def patch_width(config: Any) -> int:
    """Numbers of a patch."""
    vision = config.vision_config
    return int(vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)


def grids(batch: Mapping[str, Any], key: str) -> list[list[int]]:
    """``t, h, w`` of each image or video that an entry of a batch has.

    Raises:
        ValueError: it is of another shape.
    """
    found = batch.get(key)
    if found is None:
        return []
    if not isinstance(found, Tensor) or found.ndim != 2 or found.shape[1] != 3:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"got {key} {got}; expected a tensor [images or videos, 3]")
    rows: list[list[int]] = found.tolist()
    return rows


def check_grid(key: str, grid: Sequence[int], merge: int) -> None:
    """Refuse a grid of an entry that is not cut into whole tokens, ``merge`` patches by side.

    Raises:
        ValueError: says which.
    """
    t, h, w = grid
    if t < 1 or h < merge or w < merge or h % merge or w % merge:
        raise ValueError(
            f"got {[t, h, w]} in {key}; expected frames, height and width in patches, the "
            f"sides multiples of {merge}: use the model's own processor"
        )


def positions(
    batch: Mapping[str, Any], text: Text, config: Any, *, types: Tensor, model: Any
) -> Tensor | None:
    """See `ds_lvx.models.concatenated.family.Concatenated.positions`: ``[3, B, T]``, or those
    of a text alone that has its own. ``types`` are of its tokens, ``model`` is the class that knows
    positions."""
    given = batch.get("position_ids")
    given = None if given is None else given.cpu()
    if not bool(types.any()):
        return _of_text(given, text)
    media = {key: batch[key] for key in (GRID, VIDEO_GRID, SECONDS) if key in batch}
    _check_seconds(media.get(SECONDS), videos=len(media.get(VIDEO_GRID, ())))
    _check_shown(types, text)
    made: Tensor = model.get_rope_index(
        _Positions(config, model),
        text.input_ids,
        mm_token_type_ids=types,
        attention_mask=text.attention_mask,
        # The model adds them to places, which are on the CPU.
        **{k: each.cpu() if isinstance(each, Tensor) else each for k, each in media.items()},
    )[0]
    if given is not None and not torch.equal(given.long(), made):
        raise ValueError(
            f"got position_ids {tuple(given.shape)} that are not the model's own; expected what "
            f"get_rope_index makes of the whole batch, {tuple(made.shape)}: leave them out"
        )
    return made


def _check_shown(types: Tensor, text: Text) -> None:
    mask = text.attention_mask
    hidden = torch.zeros_like(types) if mask is None else types * (mask.to(types.device) == 0)
    if bool(hidden.any()):
        row, place = hidden.nonzero()[0].tolist()
        raise ValueError(
            f"got an attention_mask that hides token {place} of sample {row}, of an image or a "
            "video; expected 1 at all of their tokens: the model has no positions for a part"
        )


def _check_seconds(seconds: Any, *, videos: int) -> None:
    count = len(seconds) if isinstance(seconds, Tensor | list | tuple) else None
    if seconds is not None and count != videos:
        got = type(seconds).__name__ if count is None else f"{count} numbers"
        raise ValueError(
            f"got {SECONDS} of {got} for {videos} videos; expected a number for each video of the "
            "whole batch: the seconds between its temporal patches"
        )


def _of_text(given: Tensor | None, text: Text) -> Tensor | None:
    """Positions of text alone: places in the row, or what the caller has, ``[3, B, T]``."""
    if given is None:
        return None
    rows, length = text.shape
    whole = given.expand(rows, length) if given.ndim == 2 and given.shape[0] == 1 else given
    if (
        whole.shape[-2:] != (rows, length)
        or whole.ndim > 3
        or (whole.ndim == 3 and len(whole) != 3)
    ):
        raise ValueError(
            f"got position_ids {tuple(given.shape)}; expected (3, {rows}, {length}) or "
            f"({rows}, {length}): the whole sequence, neither cut nor packed"
        )
    replace(text, position_ids=whole.flatten(0, -2)).refuse_packed()
    return given.expand(3, rows, length)


class _Positions(SimpleNamespace):
    """What `get_rope_index` asks of a model, where only its config is at hand."""

    def __init__(self, config: Any, model: Any) -> None:
        places = partial(model.get_vision_position_ids, None)
        super().__init__(config=config, get_vision_position_ids=places)


def arrange(
    units: Sequence[Unit], rows: Sequence[Tensor], *, follow: tower.Follow
) -> dict[str, Any]:
    """Units as images of one video: consecutive ones of a size share a row of the grid."""
    sides = groupby(unit.about for unit in units)
    grid = [[len(list(group)), *size] for size, group in sides]
    return {PIXELS: torch.cat([*rows]), **tower.arguments(grid, follow)}


def blank(config: Any, follow: tower.Follow) -> dict[str, Any]:
    """One blank image, as small as there is."""
    side, width = int(config.vision_config.spatial_merge_size), patch_width(config)
    return {PIXELS: torch.zeros(side**2, width), **tower.arguments([[1, side, side]], follow)}
