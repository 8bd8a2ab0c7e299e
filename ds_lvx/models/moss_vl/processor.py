"""Text and pixels for MOSS-VL, from the files of a checkpoint.

The processor that comes with a checkpoint is code for another transformers; this one reads its
tokenizer and its settings, and runs none of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ds_lvx.models.moss_vl.batch import PIXELS
from ds_lvx.models.moss_vl.resize import Budget
from ds_lvx.models.remote import CHATML, read_settings

IMAGE_TOKEN = "<|image_pad|>"
_FILE = "preprocessor_config.json"
_VIDEO_FILE = "video_preprocessor_config.json"


class Processor:
    """The tokenizer of a checkpoint, and its way with pictures.

    Args:
        tokenizer: that knows `IMAGE_TOKEN`.
        settings: of ``preprocessor_config.json``.
        video: of ``video_preprocessor_config.json``; empty where there is none.
    """

    image_token = IMAGE_TOKEN

    def __init__(
        self, tokenizer: Any, settings: Mapping[str, Any], video: Mapping[str, Any]
    ) -> None:
        self.tokenizer = tokenizer
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.chat_template = tokenizer.chat_template or CHATML
        self._files = {_FILE: dict(settings), _VIDEO_FILE: dict(video)}
        self._patch = int(settings.get("patch_size", 16))
        self._merge = int(settings.get("merge_size", 2))
        size, usual = settings.get("size", {}), Budget()
        self._budget = Budget(
            least=size.get("shortest_edge", usual.least),
            most=size.get("longest_edge", usual.most),
            total=video.get("video_max_pixels", usual.total),
        )
        mean, deviation = (settings.get(f"image_{key}", [0.5] * 3) for key in ("mean", "std"))
        self._mean, self._deviation = (
            torch.tensor(each).view(3, 1, 1) for each in (mean, deviation)
        )

    @classmethod
    def of(cls, name: str) -> Processor:
        """That of a checkpoint, from a folder or the hub."""
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
        files = read_settings(name)
        return cls(tokenizer, files[_FILE], files[_VIDEO_FILE])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `of` reads."""
        self.tokenizer.save_pretrained(folder)
        for name, settings in self._files.items():
            if settings:
                (Path(folder) / name).write_text(json.dumps(settings, indent=1))

    def patches(self, picture: Any, *, frames: int, dtype: torch.dtype) -> tuple[Tensor, list[int]]:
        """A picture as the vision tower takes it.

        Args:
            picture: a PIL image.
            frames: of the sample, which share its pixels.
            dtype: of the rows.

        Returns:
            Rows ``[h * w, 3 * patch ** 2]``, a patch each: blocks of merged patches in order, then
            the patches of a block; in a row channels, then lines. And its row of ``grid_thw``.
        """
        patch, merge = self._patch, self._merge
        width, height = picture.size
        sides = self._budget.sides(height, width, frames=frames, multiple=patch * merge)
        resized = picture.convert("RGB").resize(sides[::-1], resample=3)  # bicubic
        raw = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
        pixels = raw.view(*sides, 3).permute(2, 0, 1) / 255
        pixels = ((pixels - self._mean) / self._deviation).to(dtype)
        h, w = (side // patch for side in sides)
        blocks = pixels.view(3, h // merge, merge, patch, w // merge, merge, patch)
        rows = blocks.permute(1, 4, 2, 5, 0, 3, 6).reshape(h * w, -1)
        return rows, [1, h, w]

    def frames(
        self,
        input_ids: Tensor,
        pictures: Sequence[Iterable[Any]],
        *,
        dtype: torch.dtype,
        begins: Tensor | None = None,
        first: int = 0,
    ) -> dict[str, Tensor]:
        """See `ds_lvx.models.contract.Family.frames`, and ``packed_frames``, which has ``begins``
        and ``first``: only frames of one sample share its pixels.

        Returns:
            ``pixel_values``, ``grid_thw`` (a row a frame) and ``media_nums_per_sample`` int64
            ``[B]``; nothing where this rank has no frame.
        """
        is_frame = input_ids == self.image_token_id
        sample = torch.zeros_like(input_ids) if begins is None else begins.cumsum(dim=1)
        rows: list[Tensor] = []
        grid: list[list[int]] = []
        counts = torch.zeros(len(pictures), dtype=torch.int64)
        for row, each in enumerate(pictures):
            owners = sample[row, is_frame[row]]  # of each frame of the row
            totals = owners.bincount()
            for number, picture in enumerate(each, start=first):
                total = int(totals[owners[number]])
                made, sides = self.patches(picture, frames=total, dtype=dtype)
                rows.append(made)
                grid.append(sides)
                counts[row] += 1
        if not rows:
            return {}
        return {
            PIXELS: torch.cat(rows),
            "grid_thw": torch.tensor(grid),
            "media_nums_per_sample": counts,
        }


def media_text(times: Sequence[float] | None) -> str:
    """See `ds_lvx.models.contract.Family.media_text`: every frame of a video has its time."""
    if times is None:
        return IMAGE_TOKEN
    frames = [f"<|time_start|>{time:.1f} seconds<|time_end|>{IMAGE_TOKEN}" for time in times]
    return f"<|vision_start|>{''.join(frames)}<|vision_end|>"
