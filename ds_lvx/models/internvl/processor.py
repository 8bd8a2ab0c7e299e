"""Text and pixels for InternVL, from the files of a checkpoint.

transformers' processor wants torchvision for videos, and all frames of one at once. This one takes
the checkpoint's tokenizer and settings, and a rank's tiles.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from ds_lvx.models.media import Held, Medium, Shown
from ds_lvx.models.qwen2_5_vl.processor import CHAT_TEMPLATE
from ds_lvx.models.remote import read_json
from ds_lvx.models.visual import PIXELS

START, END, IMAGE_TOKEN = "<img>", "</img>", "<IMG_CONTEXT>"
_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
_SETTINGS = ("size", "image_mean", "image_std", "min_patches", "max_patches", "resample")
_TOKENS = 256
"""Of a tile, where a checkpoint does not say it."""


class Processor:
    """The tokenizer of a checkpoint, and its way with pictures.

    Args:
        tokenizer: that knows the tokens around and of images.
        files: settings by the name of their file; empty where there is none.
    """

    image_token = IMAGE_TOKEN

    def __init__(self, tokenizer: Any, files: Mapping[str, Mapping[str, Any]]) -> None:
        self.tokenizer = tokenizer
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
        self._files = files
        images, videos, both = (files.get(name) or {} for name in _FILES)
        images = both.get("image_processor") or images
        videos = both.get("video_processor") or videos
        self._tokens = int(both.get("image_seq_length", _TOKENS))
        self.images = _tiler(images, crop=True)
        self.videos = _tiler({**images, **videos}, crop=False)

    @classmethod
    def of(cls, name: str) -> Processor:
        """That of a checkpoint, from a folder or the hub."""
        files = {file: read_json(name, file) for file in _FILES}
        return cls(AutoTokenizer.from_pretrained(name), files)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `of` reads."""
        self.tokenizer.save_pretrained(folder)
        for name, settings in self._files.items():
            if settings:
                (Path(folder) / name).write_text(json.dumps(settings, indent=1))

    def shown(self, medium: Medium) -> Shown:
        """See `ds_lvx.models.media.Parts.shown`: a token for a tile."""
        tiles = self._tiles(medium)
        tokens = (self._tokens,) * tiles
        if medium.times is None:
            return Shown(f"{START}{IMAGE_TOKEN * tiles}{END}", (1, *[0] * (tiles - 1)), tokens)
        frames = (f"Frame{n + 1}: {START}{IMAGE_TOKEN}{END}" for n in range(tiles))
        return Shown("\n".join(frames), (1,) * tiles, tokens)

    def media(self, samples: Sequence[Held], *, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `ds_lvx.models.media.Parts.media`."""
        tiles = [tile for sample in samples for tile in self._held(sample)]
        return {PIXELS: torch.stack(tiles).to(dtype)} if tiles else {}

    def _held(self, sample: Held) -> Iterator[Tensor]:
        """The tiles of a sample that are held."""
        mine, pictures, first = {*sample.units}, iter(sample.pictures), 0
        for medium in sample.media:
            count = self._tiles(medium)
            held = [n for n in range(count) if first + n in mine]
            first += count
            if medium.times is not None:
                for _ in held:
                    yield self.videos(next(pictures), return_tensors="pt")[PIXELS][0]
            elif held:
                made = self.images(next(pictures), return_tensors="pt")[PIXELS]
                yield from made[held]

    def _tiles(self, medium: Medium) -> int:
        if medium.times is not None:
            return len(medium.times)
        return int(self.images.get_number_of_image_patches(*medium.sides))


def _tiler(settings: Mapping[str, Any], *, crop: bool) -> Any:
    """transformers' own, which needs no torchvision."""
    given = {key: settings[key] for key in _SETTINGS if settings.get(key) is not None}
    return GotOcr2ImageProcessorPil(**given, crop_to_patches=crop)
