"""LLaVA-OneVision's batches: images of several tiles, and videos of frames.

A unit is an image with all its tiles, or a frame; a video's last one counts the newline token
behind it. ``about`` of an image is its tiles, height and width; of a frame 0, whether it is a last
one, 0. Legend: ``P`` patches of a tile by side, ``p`` tokens of a frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from ds_lvx.models.concatenated.batch import Unit
from ds_lvx.models.visual import PIXELS

VIDEO_PIXELS = "pixel_values_videos"
SIZES, COUNTS, VIDEO_SIZES = "image_sizes", "batch_num_images", "image_sizes_videos"
FRAMES = "frames_per_video"
"""Of each video of the whole batch, a tensor or a list: not transformers', whose videos have as
many frames each and come all at once."""
_MOST = 1.1
"""Times the side of the largest grid: as the model, which scales a larger one down."""


def side(config: Any) -> int:
    """P."""
    return int(config.vision_config.image_size) // int(config.vision_config.patch_size)


def frame_tokens(config: Any) -> int:
    """p, without a newline."""
    return math.ceil(side(config) / 2) ** 2


def token_types(ids: Tensor, config: Any) -> Tensor:
    """int64 ``[B, T]``: 1 for an image's tokens, 2 for a video's, 0 for text."""
    image, video = ids == config.image_token_id, ids == config.video_token_id
    return image.long() + 2 * video.long()


def image_tokens(size: tuple[int, int], config: Any) -> tuple[int, int]:
    """Tiles and tokens of an image of ``size``, height and width, that is alone in its sample."""
    tile, each = int(config.vision_config.image_size), side(config)
    rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, tile)
    # Nothing is computed: what the model's own function would leave of such a grid.
    grid = torch.empty(1, rows * each, columns * each, device="meta")
    height, width = scaled(unpad_image(grid, size).shape[1:], config)
    return 1 + rows * columns, each**2 + height * (width + 1)


def scaled(sides: Sequence[int], config: Any) -> tuple[int, int]:
    """Height and width of the features of an image's tiles, from those without padding."""
    height, width = sides
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(height * width / (most * side(config) ** 2))
    return (int(height // ratio), int(width // ratio)) if ratio > _MOST else (height, width)


def tiles_and_tokens(size: tuple[int, int], config: Any, *, alone: bool) -> tuple[int, int]:
    """Of an image of a size; one that is not alone in its sample is one tile."""
    return image_tokens(size, config) if alone else (1, side(config) ** 2 + 1)


def units(batch: Mapping[str, Any], ids: Tensor, config: Any) -> list[Unit]:
    """See `ds_lvx.models.concatenated.family.Concatenated.units`."""
    types, each = token_types(ids, config), frame_tokens(config)
    images, videos = _images(batch, config), _videos(batch, int((types == 2).sum()), each)
    found: list[Unit] = []
    for row, here in enumerate(types.tolist()):
        for kind, run in groupby(here):
            length = len([*run])
            if kind == 1:
                found += _run_of_images(row, length, images)
            elif kind == 2:
                known = _only_videos(row, length, each) if videos is None else videos
                found += _run_of_videos(row, length, each, known)
    for key, what, left in ((SIZES, "image", images), (FRAMES, "video", videos or ())):
        more = len([*left])
        if more:
            raise ValueError(
                f"got {key} of {more} more {what}s than have tokens in input_ids; expected the "
                f"whole text: cut none of its {what} tokens"
            )
    return found


def _images(batch: Mapping[str, Any], config: Any) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Tokens, tiles and size of each image of a batch."""
    sizes, counts = batch.get(SIZES), batch.get(COUNTS)
    if sizes is None:
        return
    if not isinstance(sizes, Tensor) or sizes.ndim != 2 or sizes.shape[1] != 2:
        got = tuple(sizes.shape) if isinstance(sizes, Tensor) else type(sizes).__name__
        raise ValueError(f"got {SIZES} {got}; expected a tensor [images, 2], height and width")
    counts = [1] * len(sizes) if counts is None else [int(count) for count in counts]
    if sum(counts) != len(sizes):
        raise ValueError(
            f"got {COUNTS} of {sum(counts)} images and {SIZES} of {len(sizes)}; expected as many: "
            "those of the whole batch, also where frames are local"
        )
    alone = [count == 1 for count in counts for _ in range(count)]
    for (height, width), tiled in zip(sizes.tolist(), alone, strict=True):
        tiles, tokens = tiles_and_tokens((height, width), config, alone=tiled)
        yield tokens, tiles, (height, width)


def _run_of_images(
    row: int, length: int, images: Iterator[tuple[int, int, tuple[int, ...]]]
) -> Iterator[Unit]:
    """The images of which a sample has so many tokens without text between."""
    left = length
    while left > 0:
        tokens, tiles, size = next(images, (0, 0, ()))
        if tokens == 0 or tokens > left:
            raise ValueError(
                f"got {left} tokens of an image in sample {row}, and {SIZES} that make {tokens}; "
                "expected as many, and a size for each image of the whole batch: use the processor "
                "that belongs to the model, and cut no text in the midst of an image"
            )
        left -= tokens
        yield Unit(row, tokens, PIXELS, 1, (tiles, *size))


def _videos(batch: Mapping[str, Any], tokens: int, each: int) -> Iterator[int] | None:
    """Frames of each video of a batch with so many tokens of videos; None where it does not say."""
    given, pixels = batch.get(FRAMES), batch.get(VIDEO_PIXELS)
    if given is not None:
        frames: list[int] = torch.as_tensor(given).flatten().tolist()
        if min(frames, default=1) < 1:
            raise ValueError(f"got {FRAMES} {frames}; expected 1 or more for each video")
        return iter(frames)
    if isinstance(pixels, Tensor) and pixels.ndim == 5:
        count, of_one = pixels.shape[:2]
        if count * (of_one * each + 1) == tokens:  # else they are some of the frames
            return iter([of_one] * count)
    return None


def _only_videos(row: int, length: int, each: int) -> Iterator[int]:
    """Frames of the videos that have so many tokens, where no others have."""
    frames, videos = divmod(length, each)
    if videos == 0:
        frames, videos = frames - 1, each
    fewer_frames = frames - 1 >= videos + each  # with as many newlines more
    if frames < videos or fewer_frames or 1 < videos < frames:
        raise _not_of_videos(row, length, each)
    return iter([frames] if videos == 1 else [1] * videos)


def _run_of_videos(row: int, length: int, each: int, videos: Iterator[int]) -> Iterator[Unit]:
    """The frames of the videos of which a sample has so many tokens without text between."""
    left = length
    while left > 0:
        frames = next(videos, 0)
        left -= frames * each + 1
        if frames == 0 or left < 0:
            raise _not_of_videos(row, length, each)
        for frame in range(frames):
            last = int(frame == frames - 1)
            yield Unit(row, each + last, VIDEO_PIXELS, 1, (0, last, 0))


def _not_of_videos(row: int, length: int, each: int) -> ValueError:
    return ValueError(
        f"got {length} video tokens in a run in sample {row}, which do not say their videos; "
        f"expected {each} for each frame and one behind each video, and {FRAMES} of the whole "
        f"batch or {VIDEO_PIXELS} [videos, frames, ...] of all of it: use the processor that "
        "belongs to the model, cut no text in the midst of a video, and with local frames give "
        f"{FRAMES}"
    )


def pixels(given: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Images ``[images, tiles, 3, H, W]`` and frames ``[frames, 3, H, W]``, checked.

    Raises:
        ValueError: other shapes.
    """
    vision = config.vision_config
    tile = (vision.num_channels, vision.image_size, vision.image_size)
    made = {}
    for key, value in given.items():
        if key == VIDEO_PIXELS and value.ndim == 5:
            value = value.flatten(0, 1)
        wanted = 4 if key == VIDEO_PIXELS else 5
        if value.ndim != wanted or tuple(value.shape[-3:]) != tile:
            what = "videos, frames" if key == VIDEO_PIXELS else "images, tiles"
            raise ValueError(
                f"got {key} {tuple(value.shape)}; expected ({what}, {', '.join(map(str, tile))}): "
                "use the processor that belongs to the model"
            )
        made[key] = value
    return made


def arrange(units: Sequence[Unit], rows: Sequence[Tensor]) -> dict[str, Any]:
    """Tiles and frames in one, and what each unit is, by `Unit.about`, which the host reads."""
    tiles = [
        row if unit.source == VIDEO_PIXELS else row[0, : unit.about[0]]
        for unit, row in zip(units, rows, strict=True)
    ]
    return {PIXELS: torch.cat(tiles), SIZES: tuple(unit.about for unit in units)}


def blank(config: Any) -> dict[str, Any]:
    """One blank frame with the newline of a video."""
    vision = config.vision_config
    tile = torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size)
    return {PIXELS: tile, SIZES: ((0, 1, 0),)}
