"""Text and pixels for Gemma 4, from the files of a checkpoint, a picture at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers.models.gemma4.image_processing_pil_gemma4 import (
    convert_image_to_patches,
    get_aspect_ratio_preserving_size,
)

from ds_lvx.models.concatenated.files import Files
from ds_lvx.models.gemma4.batch import COUNTS, PLACES, TYPES, VIDEOS, positions
from ds_lvx.models.media import Held, Medium, Shown
from ds_lvx.models.visual import PIXELS

START, END, IMAGE_TOKEN, VIDEO_TOKEN = "<|image>", "<image|>", "<|image|>", "<|video|>"
TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "<|turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{% for part in message.content %}{{ part.text | trim }}{% endfor %}<turn|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)
_APART = "\\n\\n"
"""Around an image in the source of some published chat templates."""
_BICUBIC = 3


@dataclass(frozen=True)
class Pictures:
    """How pictures become patches, as the processor's settings have it.

    Attributes:
        patch, side: pixels of a patch, and patches of a token, by side.
        tokens: that a picture has at most; it is scaled to have nearly as many.
        resample: PIL's filter.
        scale: what pixels are multiplied with.
        mean, deviation: of the channels.
    """

    patch: int
    side: int
    tokens: int
    resample: int = _BICUBIC
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    deviation: tuple[float, ...] = (1.0, 1.0, 1.0)

    @classmethod
    def of(cls, settings: Mapping[str, Any], config: Any, *, tokens: int) -> Self:
        """Those of a checkpoint.

        Args:
            settings: of its files.
            config: of the model.
            tokens: where the settings do not say it.

        Raises:
            ValueError: patches are none of the model's.
        """
        vision = config.vision_config
        wanted = vision.patch_size, vision.pooling_kernel_size
        said = (
            int(settings.get("patch_size") or wanted[0]),
            int(settings.get("pooling_kernel_size") or wanted[1]),
        )
        if said != wanted:
            raise ValueError(
                f"got patch_size and pooling_kernel_size {said} in the processor's files, and "
                f"{wanted} in config.json; expected the same: copy the files from the repository "
                "of the model"
            )
        given = {
            "resample": settings.get("resample"),
            "scale": settings.get("rescale_factor"),
            "mean": settings.get("image_mean") if settings.get("do_normalize") else None,
            "deviation": settings.get("image_std") if settings.get("do_normalize") else None,
        }
        more = {key: value for key, value in given.items() if value is not None}
        return cls(*said, int(settings.get("max_soft_tokens") or tokens), **more)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """``h, w`` in patches of a picture of a size in pixels.

        Raises:
            ValueError: it is too long for so few tokens.
        """
        most = self.tokens * self.side**2
        sides = get_aspect_ratio_preserving_size(height, width, self.patch, most, self.side)
        return sides[0] // self.patch, sides[1] // self.patch

    def patches(self, picture: Any, grid: tuple[int, int]) -> Tensor:
        """Pixels ``[h w, 3 patch^2]`` of a PIL image."""
        sides = grid[1] * self.patch, grid[0] * self.patch
        resized = picture.convert("RGB").resize(sides, resample=self.resample)
        pixels = np.asarray(resized).transpose(2, 0, 1) * np.float32(self.scale)
        mean, deviation = (
            np.asarray(each, dtype=np.float32).reshape(-1, 1, 1)
            for each in (self.mean, self.deviation)
        )
        return torch.from_numpy(convert_image_to_patches((pixels - mean) / deviation, self.patch))


class Processor(Files):
    """See `ds_lvx.models.concatenated.files.Files`.

    Args:
        tokenizer, files: likewise.
        config: of the model.
    """

    image_token = IMAGE_TOKEN
    without_template = TURNS

    def __init__(self, tokenizer: Any, files: Mapping[str, Mapping[str, Any]], config: Any) -> None:
        super().__init__(tokenizer, files)
        # As transformers' processor does: some tokenizers have it in their vocabulary alone, and
        # would cut it into pieces.
        tokenizer.add_tokens(VIDEO_TOKEN, special_tokens=True)
        self.video_token_id = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
        said = self.image_token_id, self.video_token_id
        wanted = config.image_token_id, config.video_token_id
        if said != wanted:
            raise ValueError(
                f"got a tokenizer whose {IMAGE_TOKEN} and {VIDEO_TOKEN} are {said}, and a "
                f"config.json by which they are {wanted}; expected the same: copy the files from "
                "the repository of the model"
            )
        self.images = Pictures.of(self.of_images, config, tokens=280)
        self.videos = Pictures.of(self.of_videos, config, tokens=70)
        self._apart = "\n\n" if f"{_APART}{IMAGE_TOKEN}{_APART}" in self.chat_template else ""

    def shown(self, medium: Medium) -> Shown:
        """See `ds_lvx.models.contract.Family.shown`: before each frame stands its minute and
        second."""
        if medium.times is None:
            frames, text = 1, f"{START}{IMAGE_TOKEN}{END}"
        else:
            frames, frame = len(medium.times), f"{START}{VIDEO_TOKEN}{END}"
            clock = (f"{int(time // 60):02d}:{int(time % 60):02d}" for time in medium.times)
            text = " ".join(f"{time} {frame}" for time in clock)
        height, width = self.grid(medium)
        tokens = height * width // self.images.side**2
        return Shown(f"{self._apart}{text}{self._apart}", (1,) * frames, (tokens,) * frames)

    def grid(self, medium: Medium) -> tuple[int, int]:
        """``h, w`` in patches of an image, or of a frame of a video."""
        return self._pictures(medium).grid(*medium.sides)

    def media(self, samples: Sequence[Held], *, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `ds_lvx.models.contract.Family.media`."""
        grids: dict[str, list[tuple[int, int]]] = {PIXELS: [], VIDEOS: []}
        rows: dict[str, list[Tensor]] = {PIXELS: [], VIDEOS: []}
        frames = []
        for sample in samples:
            for medium in sample.media:
                count = 1 if medium.times is None else len(medium.times)
                grids[_source(medium)] += [self.grid(medium)] * count
                if medium.times is not None:
                    frames.append(count)
            for source, made in self._made(sample):
                rows[source].append(made.to(dtype))
        found = {COUNTS: torch.tensor(frames)} if frames else {}
        for source, each in grids.items():
            if each:
                longest = max(height * width for height, width in each)
                found[PLACES[source]] = positions(each, longest, self.images.side)
            if rows[source]:
                found[source] = _stacked(rows[source], longest)
        return found

    def _made(self, sample: Held) -> Iterator[tuple[str, Tensor]]:
        """The patches of each unit that is held, and what they belong to."""
        mine, pictures, number = {*sample.units}, iter(sample.pictures), 0
        for medium in sample.media:
            grid, how = self.grid(medium), self._pictures(medium)
            for _ in medium.times or (0.0,):
                if number in mine:
                    yield _source(medium), how.patches(next(pictures), grid)
                number += 1

    def _pictures(self, medium: Medium) -> Pictures:
        return self.images if medium.times is None else self.videos


def _source(medium: Medium) -> str:
    return PIXELS if medium.times is None else VIDEOS


def _stacked(rows: Sequence[Tensor], longest: int) -> Tensor:
    """Patches of pictures, padded at their end."""
    made = rows[0].new_zeros(len(rows), longest, rows[0].shape[-1])
    for number, row in enumerate(rows):
        made[number, : len(row)] = row
    return made


def inputs(
    processor: Processor, input_ids: Sequence[int], labels: Sequence[int]
) -> dict[str, Sequence[int]]:
    """See `ds_lvx.models.contract.Family.inputs`: with which tokens are images' and videos'."""
    kinds = {processor.image_token_id: 1, processor.video_token_id: 2}
    types = [kinds.get(token, 0) for token in input_ids]
    return {"input_ids": input_ids, "labels": labels, TYPES: types}
