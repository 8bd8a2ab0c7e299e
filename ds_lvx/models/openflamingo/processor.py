"""Text and pixels for OpenFlamingo, from the folder that `convert` writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ds_lvx.models.openflamingo.batch import PIXELS

IMAGE_TOKEN = "<image>"
END_TOKEN = "<|endofchunk|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %} Short answer:"
    "{% for part in message.content %}{{ part.text }}{% endfor %}" + END_TOKEN + "{% else %}"
    "{% set asked = namespace(so_far=message.role != 'user') %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}" + IMAGE_TOKEN + "{% elif part.type == 'text' %}"
    "{{ '' if asked.so_far else 'Question:' }}{% set asked.so_far = true %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} Short answer:{% endif %}"
)
"""For tokenizers without one: what the package asks in its evaluation of visual questions."""


class Processor:
    """The tokenizer of a checkpoint, and CLIP's way with pictures.

    Args:
        tokenizer: that knows `IMAGE_TOKEN` and `END_TOKEN`.
        images: a picture to its pixels.
    """

    image_token = IMAGE_TOKEN

    def __init__(self, tokenizer: Any, images: Any) -> None:
        self.tokenizer, self.images = tokenizer, images
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.chat_template = None if tokenizer.chat_template else _CHAT_TEMPLATE

    @classmethod
    def of(cls, name: str) -> Processor:
        """That of a checkpoint, from a folder or the hub."""
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
        return cls(tokenizer, CLIPImageProcessorPil.from_pretrained(name))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `of` reads."""
        self.tokenizer.save_pretrained(folder)
        self.images.save_pretrained(folder)

    def frames(
        self, pictures: Sequence[Iterable[Any]], *, count: int, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """See `ds_lvx.models.contract.Family.frames`.

        Returns:
            ``vision_x [B, count, 1, 3, height, width]``.
        """
        size = self.images.crop_size
        pixels = torch.zeros(len(pictures), count, 1, 3, size["height"], size["width"], dtype=dtype)
        for row, sample in enumerate(pictures):
            for place, picture in enumerate(sample):
                made = self.images(picture, return_tensors="pt")["pixel_values"]
                pixels[row, place] = made.to(dtype)
        return {PIXELS: pixels}
