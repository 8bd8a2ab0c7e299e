"""Text and pixels for SmolVLM and Idefics3, from the files of a checkpoint.

transformers' processor wants torchvision for videos, and all frames of one at once. This one takes
the checkpoint's tokenizer and settings, and a rank's tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.smolvlm.image_processing_pil_smolvlm import (
    SmolVLMImageProcessorPil,
    get_resize_output_image_size,
)

from ds_lvx.models.concatenated.files import Files
from ds_lvx.models.media import Held, Medium, Shown
from ds_lvx.models.smolvlm.batch import MASK, tile_tokens
from ds_lvx.models.visual import PIXELS

IMAGE_TOKEN, AROUND, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"
_SETTINGS = (
    *("size", "max_image_size", "image_mean", "image_std", "resample"),
    *("do_resize", "do_image_splitting"),
)
_LARGE = {"longest_edge": 4 * 364}
_TILE = {"longest_edge": 364}


class Processor(Files):
    """See `ds_lvx.models.concatenated.files.Files`.

    Args:
        tokenizer, files: likewise.
        config: of the model, by which a tile has so many tokens.

    Raises:
        ValueError: the files cut images to tiles that are none of the model's.
    """

    image_token = IMAGE_TOKEN

    def __init__(self, tokenizer: Any, files: Mapping[str, Mapping[str, Any]], config: Any) -> None:
        super().__init__(tokenizer, files)
        self._tokens = tile_tokens(config)
        images = {"size": _LARGE, "max_image_size": _TILE, **self.of_images}
        sampled = {**self.of_images.get("video_sampling", {}), **self.of_videos}
        size = sampled.get("video_size") or sampled.get("size") or images["max_image_size"]
        self.images = _tiler(images)
        self.videos = _tiler({**images, **self.of_videos, "size": size}, do_image_splitting=False)
        self._side = int(images["max_image_size"]["longest_edge"])
        if self._side != config.vision_config.image_size:
            raise ValueError(
                f"got max_image_size {self._side} in preprocessor_config.json, and a config.json "
                f"whose tower takes tiles of {config.vision_config.image_size}; expected the same: "
                "copy both files from the repository of the model"
            )

    def shown(self, medium: Medium) -> Shown:
        """See `ds_lvx.models.contract.Family.shown`: a token for a tile."""
        alone = f"{AROUND}{WHOLE}{IMAGE_TOKEN}{AROUND}"
        if medium.times is not None:
            frames = len(medium.times)
            length = timedelta(seconds=int(medium.times[-1]))
            text = (
                f"You are provided the following series of {in_words(frames)} frames from a "
                f"{length} [H:MM:SS] video.\n"
            )
            for time in medium.times:
                text += f"\nFrame from {int(time // 60):02d}:{int(time % 60):02d}:{alone}"
            return Shown(f"{text}\n\n", (1,) * frames, (self._tokens,) * frames)
        rows, columns = self.grid(*medium.sides)
        lines = (
            "".join(f"{AROUND}<row_{row + 1}_col_{n + 1}>{IMAGE_TOKEN}" for n in range(columns))
            for row in range(rows)
        )
        text = "".join(f"{line}\n" for line in lines) + ("\n" if rows else "") + alone
        tiles = rows * columns + 1
        return Shown(text, (1, *[0] * (tiles - 1)), (self._tokens,) * tiles)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tiles that an image is cut to; without any it is one tile.

        transformers' own count, `get_number_of_image_patches`, is not always what it cuts.
        """
        if not self.images.do_image_splitting:
            return 0, 0
        if self.images.do_resize:
            longest = int(self.images.size["longest_edge"])
            like = np.broadcast_to(np.uint8(0), (height, width))
            height, width = get_resize_output_image_size(like, longest)
        ratio = width / height
        if width >= height:
            width = self._tiles(width) * self._side
            height = int(width / ratio)
        else:
            height = self._tiles(height) * self._side
            width = int(height * ratio)
        rows, columns = self._tiles(height), self._tiles(width)
        return (rows, columns) if rows * columns > 1 else (0, 0)

    def media(self, samples: Sequence[Held], *, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `ds_lvx.models.contract.Family.media`."""
        held = [tiles for sample in samples if (tiles := [*self._held(sample)])]
        if not held:
            return {}
        side = (3, self._side, self._side)
        made = torch.zeros(len(held), max(map(len, held)), *side, dtype=dtype)
        mask = torch.zeros(*made.shape[:2], *side[1:], dtype=torch.int64)
        for row, tiles in enumerate(held):
            for number, tile in enumerate(tiles):
                made[row, number], mask[row, number] = tile, 1
        return {PIXELS: made, MASK: mask}

    def _held(self, sample: Held) -> Iterator[Tensor]:
        """The tiles of a sample that are held."""
        mine, pictures, first = {*sample.units}, iter(sample.pictures), 0
        for medium in sample.media:
            if medium.times is None:
                rows, columns = self.grid(*medium.sides)
                count = rows * columns + 1
            else:
                count = len(medium.times)
            held = [n for n in range(count) if first + n in mine]
            first += count
            if medium.times is not None:
                for _ in held:
                    yield self.videos(next(pictures), return_tensors="pt")[PIXELS][0, 0]
            elif held:
                made = self.images(next(pictures), return_tensors="pt")[PIXELS][0]
                yield from made[held]

    def _tiles(self, side: int) -> int:
        return math.ceil(side / self._side)


def _tiler(settings: Mapping[str, Any], **more: Any) -> Any:
    """transformers' own, which needs no torchvision; Idefics3's is the same."""
    given = {key: settings[key] for key in _SETTINGS if settings.get(key) is not None}
    return SmolVLMImageProcessorPil(**{**given, **more})


_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """A number below a million in English, as the package num2words has it."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return f"{_ONES[hundreds]} hundred" + (f" and {in_words(rest)}" if rest else "")
    thousands, rest = divmod(number, 1000)
    joint = " and " if rest < 100 else ", "
    return f"{in_words(thousands)} thousand" + (joint + in_words(rest) if rest else "")
