"""Text and pixels for Qwen2.5-VL, from the files of a checkpoint.

transformers' processor wants torchvision for videos, and all frames of one at once. This one takes
the checkpoint's tokenizer and settings, and a rank's frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ds_lvx.models.concatenated.files import Files
from ds_lvx.models.concatenated.patches import Patches
from ds_lvx.models.media import Held, Medium, Shown
from ds_lvx.models.qwen2_5_vl.batch import GRID, SECONDS, VIDEO_GRID, VIDEO_PIXELS
from ds_lvx.models.visual import PIXELS

START, END = "<|vision_start|>", "<|vision_end|>"
IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"


class Processor(Files):
    """See `ds_lvx.models.concatenated.files.Files`.

    Attributes:
        image_pixels, video_pixels: least and most of an image and of a frame, and
        settings: others, as transformers has them where a checkpoint has none; and
        video_settings: likewise, of videos, where these have others than images.
        says_seconds: a batch has the seconds between two units of each video.
        image_ends, video_ends: what stands before and behind an image, and a video.
    """

    image_token, video_token = IMAGE_TOKEN, VIDEO_TOKEN
    image_pixels = (56 * 56, 28 * 28 * 1280)
    video_pixels = (128 * 28 * 28, 768 * 28 * 28)
    settings: Mapping[str, Any] = MappingProxyType({})
    video_settings: Mapping[str, Any] = MappingProxyType({})
    says_seconds = True
    image_ends = video_ends = (START, END)

    def __init__(self, tokenizer: Any, files: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(tokenizer, files)
        images = {**self.settings, **self.of_images}
        least, most = self.image_pixels
        self.images = Patches.of(images, least=least, most=most)
        shared = {k: v for k, v in images.items() if k not in ("size", "min_pixels", "max_pixels")}
        least, most = self.video_pixels
        self.of_videos = {**shared, **self.video_settings, **self.of_videos}
        self.videos = Patches.of(self.of_videos, least=least, most=most)

    def shown(self, medium: Medium) -> Shown:
        """See `ds_lvx.models.contract.Family.shown`: a token for an image, or for two frames."""
        tokens, units = self._patches(medium).tokens(self.grid(medium)), self._units(medium)
        start, end = self.image_ends if medium.times is None else self.video_ends
        between = self.image_token if medium.times is None else self.written(medium.times)
        return Shown(f"{start}{between}{end}", tuple(units), (tokens,) * len(units))

    def written(self, times: Sequence[float]) -> str:
        """What stands between start and end of a video, by the times of its frames."""
        return VIDEO_TOKEN * -(-len(times) // self.videos.frames)

    def grid(self, medium: Medium) -> tuple[int, int]:
        """``h, w`` in patches of an image, or of a frame of a video.

        Raises:
            ValueError: it is more than 200 times as long as wide.
        """
        return self._patches(medium).grid(*medium.sides)

    def media(self, samples: Sequence[Held], *, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `ds_lvx.models.contract.Family.media`."""
        grids: dict[str, list[list[int]]] = {GRID: [], VIDEO_GRID: []}
        rows: dict[str, list[Tensor]] = {PIXELS: [], VIDEO_PIXELS: []}
        seconds: list[float] = []
        for sample in samples:
            for medium in sample.media:
                grid = self.grid(medium)
                if medium.times is None:
                    grids[GRID].append([1, *grid])
                else:
                    grids[VIDEO_GRID].append([len(self._units(medium)), *grid])
                    seconds.append(self._seconds(medium.times))
            for source, made in self._made(sample, dtype):
                rows[source].append(made)
        found = {key: torch.tensor(each) for key, each in grids.items() if each}
        found |= {key: torch.cat(each) for key, each in rows.items() if each}
        if seconds and self.says_seconds:
            found[SECONDS] = torch.tensor(seconds)
        return found

    def _made(self, sample: Held, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The rows of each unit that is held, and what they belong to."""
        mine, pictures, number = {*sample.units}, iter(sample.pictures), 0
        for medium in sample.media:
            patches, grid = self._patches(medium), self.grid(medium)
            source = PIXELS if medium.times is None else VIDEO_PIXELS
            for frames in self._units(medium):
                if number in mine:
                    taken = [next(pictures) for _ in range(frames)]
                    yield source, patches.rows(taken, grid, dtype=dtype)
                number += 1

    def _patches(self, medium: Medium) -> Patches:
        patches = self.images if medium.times is None else self.videos
        return patches.within(*medium.pixels)

    def _units(self, medium: Medium) -> list[int]:
        """Frames of each unit."""
        count, each = 1 if medium.times is None else len(medium.times), self.videos.frames
        return [min(each, count - first) for first in range(0, count, each)]

    def _seconds(self, times: Sequence[float]) -> float:
        """Between two units of a video."""
        steps = len(times) - 1
        return self.videos.frames * (times[-1] - times[0]) / steps if steps > 0 else 1.0
