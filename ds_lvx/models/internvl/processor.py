"""Text and pixels for InternVL, from the files of a checkpoint.

transformers' processor wants torchvision for videos, and all frames of one at once. This one takes
the checkpoint's tokenizer and settings, and a rank's tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from ds_lvx.models.concatenated.files import Files
from ds_lvx.models.internvl.batch import tile_tokens
from ds_lvx.models.media import Held, Medium, Shown
from ds_lvx.models.visual import PIXELS

START, END, IMAGE_TOKEN = "<img>", "</img>", "<IMG_CONTEXT>"
_SETTINGS = ("size", "image_mean", "image_std", "min_patches", "max_patches", "resample")


class Processor(Files):
    """See `ds_lvx.models.concatenated.files.Files`.

    Args:
        tokenizer, files: likewise.
        config: of the model, by which a tile has so many tokens.

    Raises:
        ValueError: the files say that it has others.
    """

    image_token = IMAGE_TOKEN

    def __init__(self, tokenizer: Any, files: Mapping[str, Mapping[str, Any]], config: Any) -> None:
        super().__init__(tokenizer, files)
        self._tokens = tile_tokens(config)
        said = self.of_both.get("image_seq_length", self._tokens)
        if said != self._tokens:
            raise ValueError(
                f"got image_seq_length {said} in processor_config.json, and a config.json by whose "
                f"sizes a tile has {self._tokens} tokens; expected the same: copy both files from "
                "the repository of the model"
            )
        self.images = _tiler(self.of_images, crop=True)
        self.videos = _tiler({**self.of_images, **self.of_videos}, crop=False)

    def shown(self, medium: Medium) -> Shown:
        """See `ds_lvx.models.contract.Family.shown`: a token for a tile."""
        tiles = self._tiles(medium)
        tokens = (self._tokens,) * tiles
        if medium.times is None:
            return Shown(f"{START}{IMAGE_TOKEN * tiles}{END}", (1, *[0] * (tiles - 1)), tokens)
        frames = (f"Frame{n + 1}: {START}{IMAGE_TOKEN}{END}" for n in range(tiles))
        return Shown("\n".join(frames), (1,) * tiles, tokens)

    def media(self, samples: Sequence[Held], *, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `ds_lvx.models.contract.Family.media`."""
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
