"""Gemma 4's batches: images and frames of any shape, as patches with their places.

The processor pads an image's patches and gives each its column and row, -1 where it pads. Padding
is left out here, but for what images of a rank need to be as long as its longest. A frame of a
video has a text before it and is like an image; both go through the tower at once.

Legend: ``N`` images or frames, ``P`` patches of one with padding, ``h, w`` of one, ``k`` patches of
a token by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds_lvx.models.concatenated.batch import Arrange, Unit
from ds_lvx.models.concatenated.seen import ends_of_runs, token_types
from ds_lvx.models.text import described, is_integer
from ds_lvx.models.visual import PIXELS

VIDEOS = "pixel_values_videos"
PLACES = {PIXELS: "image_position_ids", VIDEOS: "video_position_ids"}
"""Of the patches of an entry with pixels."""
TYPES, COUNTS = "mm_token_type_ids", "num_frames_per_video"
AUDIO = ("input_features", "input_features_mask")
TAKEN, MASK = "tower_taken", "tower_mask"
"""Where images of a rank are unequal: which of the tower's tokens are theirs, int64 ``[tokens]``,
and what is added to its scores, ``[N, 1, 1, P]``."""


def special(ids: Tensor, config: Any) -> Tensor:
    """bool ``[B, T]``: tokens that stand for what is no text, of which the model takes padding's
    embeddings."""
    tokens = (config.image_token_id, config.video_token_id, config.audio_token_id)
    found = [ids == token for token in tokens if token is not None]
    return torch.stack(found).any(dim=0)


def visual_tokens(ids: Tensor, config: Any) -> Tensor:
    """See `ds_lvx.models.concatenated.family.Concatenated.visual_tokens`."""
    return (ids == config.image_token_id) | (ids == config.video_token_id)


def units(batch: Mapping[str, Any], ids: Tensor, config: Any) -> list[Unit]:
    """See `ds_lvx.models.concatenated.family.Concatenated.units`.

    Raises:
        NotImplementedError: sounds.
    """
    if any(batch.get(key) is not None for key in AUDIO):
        raise NotImplementedError(
            f"got {AUDIO[0]}, sounds; expected text, images and videos: leave audio out of the "
            "messages. A model with an audio tower is served, whose tower then does nothing"
        )
    side = config.vision_config.pooling_kernel_size
    grids = {source: iter(_grids(batch, source, side)) for source in PLACES}
    found: list[Unit] = []
    for row, line in enumerate(ids):
        kinds = (line[visual_tokens(line, config)] == config.video_token_id).tolist()
        start = 0
        while start < len(kinds):
            source = VIDEOS if kinds[start] else PIXELS
            grid = next(grids[source], None)
            tokens = 0 if grid is None else grid[0] * grid[1] // side**2
            if grid is None or kinds[start : start + tokens] != [kinds[start]] * tokens:
                raise _unfitting(row, source, "as many tokens as the patches make")
            found.append(Unit(row, tokens, source, 1, grid))
            start += tokens
    more = {source: len([*rest]) for source, rest in grids.items()}
    for source, count in more.items():
        if count:
            raise _unfitting(len(ids) - 1, source, f"none left, and {count} are")
    return found


def _unfitting(row: int, source: str, wanted: str) -> ValueError:
    return ValueError(
        f"got a text up to sample {row} that does not fit {PLACES[source]}; expected {wanted}: use "
        "the processor that belongs to the model, and cut no text in the midst of an image"
    )


def _grids(batch: Mapping[str, Any], source: str, side: int) -> list[tuple[int, int]]:
    """``h, w`` of an entry's images or frames."""
    key = PLACES[source]
    given = batch.get(key)
    if given is None:
        if batch.get(source) is not None:
            raise ValueError(f"got {source} without {key}; expected both, as the processor has it")
        return []
    if not is_integer(given) or given.ndim < 3 or given.shape[-1] != 2:
        raise ValueError(
            f"got {key} {described(given)}; expected integers (images, patches, 2), the column and "
            "row of each patch, as the processor returns it"
        )
    places = given.flatten(0, -3).cpu()
    there = (places != -1).all(dim=-1)
    columns, rows = (places.amax(dim=1) + 1).unbind(-1)
    found = [*zip(rows.tolist(), columns.tolist(), strict=True)]
    wanted = {grid: positions([grid], places.shape[1], side) for grid in {*found}}
    for number, grid in enumerate(found):
        if int(there[number].sum()) != grid[0] * grid[1] or not bool(
            (places[number] == wanted[grid][0]).all()
        ):
            raise ValueError(
                f"got {key} whose image {number} is no grid of {grid[0]} x {grid[1]} patches line "
                "by line, with padding of -1 behind; expected one, as the processor returns it"
            )
    return found


def positions(grids: Sequence[tuple[int, int]], length: int, side: int) -> Tensor:
    """Column and row of each patch, int64 ``[N, P, 2]``, -1 where it pads.

    Args:
        grids: ``h, w`` of each.
        length: P.
        side: k.

    Raises:
        ValueError: a grid that is larger than P, or no multiple of k.
    """
    places = torch.full((len(grids), length, 2), -1)
    for number, (height, width) in enumerate(grids):
        if height % side or width % side or not 0 < height * width <= length:
            raise ValueError(
                f"got an image of {height} x {width} patches, in {length}; expected multiples of "
                f"{side} by side, of which a token is made: use the model's own processor"
            )
        grid = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
        places[number, : height * width] = torch.stack(grid, dim=-1).flatten(0, 1)
    return places


def patches(pixels: Tensor, key: str, config: Any) -> Tensor:
    """Pixels ``[N, P, 3 patch^2]`` of images, or of the frames of all videos.

    Raises:
        ValueError: pixels of another shape than the tower takes.
    """
    width = 3 * config.vision_config.patch_size**2
    if pixels.ndim < 3 or pixels.shape[-1] != width:
        raise ValueError(
            f"got {key} {tuple(pixels.shape)}; expected (images, patches, {width}): use the "
            "processor that belongs to the model"
        )
    return pixels.flatten(0, -3)


def ends(batch: Mapping[str, Any], ids: Tensor) -> Tensor | None:
    """int64 ``[B, T]``, one past the last place that each token sees; None: none behind it.

    Source: transformers, ``gemma4.get_block_sequence_ids_for_mask``.
    """
    types = token_types(batch, TYPES, ids)
    return None if types is None else ends_of_runs((types == 1) | (types == 2))


def arrange(config: Any) -> Arrange:
    """See `ds_lvx.models.concatenated.family.Concatenated.arrange`."""
    return partial(_arrange, side=config.vision_config.pooling_kernel_size)


def _arrange(units: Sequence[Unit], rows: Sequence[Tensor], *, side: int) -> dict[str, Tensor]:
    grids = [(unit.about[0], unit.about[1]) for unit in units]
    counts = [height * width for height, width in grids]
    longest = max(counts)
    pixels = rows[0].new_zeros(len(units), longest, rows[0].shape[-1])
    for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
        pixels[number, :count] = row[0, :count]
    places = positions(grids, longest, side)
    made = {PIXELS: pixels, PLACES[PIXELS]: places}
    if min(counts) == longest:
        return made
    there = (places >= 0).all(dim=-1)
    tokens = torch.tensor([unit.tokens for unit in units])
    taken = torch.arange(longest // side**2) < tokens[:, None]
    added = torch.zeros(there.shape).masked_fill(~there, torch.finfo(torch.float32).min)
    return {**made, TAKEN: taken.flatten().nonzero()[:, 0], MASK: added[:, None, None]}


def blank(config: Any) -> dict[str, Tensor]:
    """One blank image, of a token."""
    vision = config.vision_config
    side = vision.pooling_kernel_size
    pixels = torch.zeros(1, side**2, 3 * vision.patch_size**2)
    return {PIXELS: pixels, PLACES[PIXELS]: positions([(side, side)], side**2, side)}
