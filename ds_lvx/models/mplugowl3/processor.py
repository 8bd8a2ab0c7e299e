"""Text and pixels for mPLUG-Owl3, from the files of a checkpoint.

The processor that comes with a checkpoint is code for another transformers; this one reads its
tokenizer and the size of its images, and runs none of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from ds_lvx.models.mplugowl3.batch import OFFSETS, PADDING
from ds_lvx.models.remote import read_section
from ds_lvx.models.visual import COUNTS, PIXELS

IMAGE_TOKEN = "<|image|>"
_VIDEO = ("<|start_video_frame|>", "<|end_video_frame|>")
_CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n<|im_end|>{% endif %}"
    "{% for message in messages %}"
    "{{ '' if message.role == 'system' else '\n' }}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
    "<|im_end|>{{ '<|endoftext|>' if message.role == 'assistant' else '' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}<|im_start|>assistant\n{% endif %}"
)
"""What the checkpoints' own processor writes, whatever template their tokenizer has."""


class Processor:
    """The tokenizer of a checkpoint, and its way with pictures.

    Args:
        tokenizer: that knows `IMAGE_TOKEN`.
        side: pixels of an image, by side.
    """

    image_token = IMAGE_TOKEN
    chat_template = _CHAT_TEMPLATE

    def __init__(self, tokenizer: Any, side: int) -> None:
        self.tokenizer = tokenizer
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._side = side

    @classmethod
    def of(cls, name: str) -> Processor:
        """That of a checkpoint, from a folder or the hub."""
        side = int(read_section(name, "vision_config")["image_size"])
        return cls(PreTrainedTokenizerFast.from_pretrained(name), side)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `of` reads; the model writes its config."""
        self.tokenizer.save_pretrained(folder)

    def pixels(self, picture: Any, *, dtype: torch.dtype) -> Tensor:
        """A PIL image as the vision tower takes it, ``[3, side, side]``, uncut."""
        resized = picture.convert("RGB").resize((self._side, self._side), resample=3)  # bicubic
        raw = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
        pixels = raw.view(self._side, self._side, 3).permute(2, 0, 1) / 255
        return ((pixels - 0.5) / 0.5).to(dtype)

    def frames(
        self, input_ids: Tensor, pictures: Sequence[Iterable[Any]], *, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """See `ds_lvx.models.contract.Family.frames`.

        Returns:
            ``media_offset`` int64 ``[B, N]``, padded with -1; ``images_per_sample`` int64 ``[B]``;
            and ``pixel_values`` ``[images, 3, side, side]`` where this rank has some.
        """
        places = [torch.where(row == self.image_token_id)[0] for row in input_ids]
        made = [[self.pixels(each, dtype=dtype) for each in sample] for sample in pictures]
        found = {
            OFFSETS: pad_sequence(places, batch_first=True, padding_value=PADDING),
            COUNTS: torch.tensor([len(each) for each in made]),
        }
        images = [image for sample in made for image in sample]
        return {**found, PIXELS: torch.stack(images)} if images else found


def media_text(tokenizer: Any, times: Sequence[float] | None) -> str:
    """See `ds_lvx.models.contract.Family.media_text`; release 240728 has no tokens for a video."""
    if times is None:
        return IMAGE_TOKEN
    frames = IMAGE_TOKEN * len(times)
    if _VIDEO[0] not in tokenizer.get_vocab():
        return frames
    return frames.join(_VIDEO)
