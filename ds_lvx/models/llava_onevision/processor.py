"""Text and pixels for LLaVA-OneVision, from the files of a checkpoint.

transformers' processor wants torchvision for videos, and all frames of one at once. This one takes
the checkpoint's tokenizer and settings, and a rank's images and frames. How many tokens an image
has is the model's to say: sizes and grids are those of its config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from ds_lvx.models.concatenated.files import Files
from ds_lvx.models.llava_onevision import batch as batches
from ds_lvx.models.media import Held, Medium, Shown
from ds_lvx.models.visual import PIXELS

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
_SETTINGS = ("image_mean", "image_std", "resample")


class Processor(Files):
    """See `ds_lvx.models.concatenated.files.Files`.

    Args:
        tokenizer, files: likewise.
        config: of the model.
    """

    image_token, video_token = IMAGE_TOKEN, VIDEO_TOKEN

    def __init__(self, tokenizer: Any, files: Mapping[str, Mapping[str, Any]], config: Any) -> None:
        super().__init__(tokenizer, files)
        self._config = config
        grids = [[*grid] for grid in config.image_grid_pinpoints]
        self.images = LlavaOnevisionImageProcessorPil(
            **self._settings(self.of_images), image_grid_pinpoints=grids
        )
        videos = {**self.of_images, **self.of_videos}
        self.videos = SiglipImageProcessorPil(**self._settings(videos))

    def shown(self, medium: Medium) -> Shown:
        """See `ds_lvx.models.contract.Family.shown`: a token for an image or a frame; behind a
        video's last one stands a newline, which is its token's as well."""
        if medium.times is None:
            _, tokens = batches.tiles_and_tokens(medium.sides, self._config, alone=medium.alone)
            return Shown(IMAGE_TOKEN, (1,), (tokens,))
        frames, each = len(medium.times), batches.frame_tokens(self._config)
        of_frames = (*[each] * (frames - 1), each + 1)
        return Shown(VIDEO_TOKEN * frames, (1,) * frames, of_frames)

    def media(self, samples: Sequence[Held], *, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `ds_lvx.models.contract.Family.media`."""
        images = [[each for each in s.media if each.times is None] for s in samples]
        sizes = [each.sides for sample in images for each in sample]
        found: dict[str, Tensor] = {}
        if sizes:
            counts = [len(sample) for sample in images if sample]
            found = {
                batches.SIZES: torch.tensor(sizes),
                batches.COUNTS: torch.tensor(counts),
            }
        videos = [len(each.times) for s in samples for each in s.media if each.times is not None]
        if videos:
            found[batches.FRAMES] = torch.tensor(videos)
        tiles: list[Tensor] = []
        frames: list[Tensor] = []
        for pixels in (each for sample in samples for each in self._held(sample)):
            (tiles if pixels.ndim == 4 else frames).append(pixels.to(dtype))
        if tiles:  # of an image with fewer they are padded, as the model's own processor does
            found[PIXELS] = torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True)
        if frames:
            found[batches.VIDEO_PIXELS] = torch.stack(frames)
        return found

    def _held(self, sample: Held) -> Iterator[Tensor]:
        """Tiles ``[tiles, 3, H, W]`` of an image, or a frame ``[3, H, W]``, of what is held."""
        mine, pictures, number = {*sample.units}, iter(sample.pictures), 0
        for medium in sample.media:
            for _ in medium.times or (0.0,):
                if number in mine:
                    yield self._pixels(medium, next(pictures))
                number += 1

    def _pixels(self, medium: Medium, picture: Any) -> Tensor:
        if medium.times is not None:
            made: Tensor = self.videos(picture, return_tensors="pt")[PIXELS][0]
        elif medium.alone:
            made = self.images([picture], return_tensors="pt")[PIXELS][0]
        else:  # two of a sample are not tiled
            several: Any = [[picture, picture]]
            made = self.images(several, return_tensors="pt")[PIXELS][0]
        return made

    def _settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        side = int(self._config.vision_config.image_size)
        defaults = {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
        given = {key: settings[key] for key in _SETTINGS if settings.get(key) is not None}
        return {**defaults, **given, "size": {"height": side, "width": side}}
