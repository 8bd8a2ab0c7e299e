"""Text and pixels for Qwen-VL, from the files of a checkpoint.

The tokenizer that comes with a checkpoint is slow code for another transformers, which writes the
path of an image into the text; this one reads its table of tokens, and runs none of it.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.utils.hub import cached_file

from ds_lvx.models.adapters.pixels import whole_picture
from ds_lvx.models.remote import read_json
from ds_lvx.models.visual import COUNTS, PIXELS

IMAGE_TOKEN = "<imgpad>"
START = "<img>"
_TABLE = "qwen.tiktoken"
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{number}|>" for number in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", START, "</img>", IMAGE_TOKEN),
)
"""Behind the tokens of the table, in this order."""
_CHAT_TEMPLATE = (
    "{% set count = namespace(images=0) %}"
    "{% if messages[0].role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}{% set count.images = count.images + 1 %}"
    "Picture {{ count.images }}: " + START + IMAGE_TOKEN + "</img>\n"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""What the code of Qwen-VL-Chat writes."""


class Processor:
    """The tokenizer of a checkpoint, and its way with pictures.

    Args:
        tokenizer: that knows `SPECIAL`.
        side: pixels of an image, by side.
        places: of an image in the text.
    """

    image_token = IMAGE_TOKEN
    chat_template = _CHAT_TEMPLATE

    def __init__(self, tokenizer: Any, *, side: int, places: int) -> None:
        self.tokenizer, self.places = tokenizer, places
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._side = side

    @classmethod
    def of(cls, name: str, *, side: int, places: int, start: int) -> Processor:
        """That of a checkpoint, from a folder or the hub.

        Args:
            name: of the folder, or on the hub.
            side, places: see the class.
            start: the id of ``<img>``, as the model has it.

        Raises:
            ValueError: the tokenizer's is another one, or there is no table of tokens.
        """
        if read_json(name, "tokenizer.json"):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
        else:
            tokenizer = _of_table(name)
        found = tokenizer.convert_tokens_to_ids(START)
        if found != start:
            raise ValueError(
                f"got a tokenizer in which {START} is {found}, and a model for which it is "
                f"{start}; expected the same: take the tokenizer of the checkpoint"
            )
        return cls(tokenizer, side=side, places=places)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `of` reads; the model writes its config."""
        self.tokenizer.save_pretrained(folder)

    def pixels(self, picture: Any) -> Tensor:
        """A PIL image as the vision tower takes it, ``[3, side, side]``."""
        return whole_picture(picture, self._side)

    def frames(self, pictures: Sequence[Iterable[Any]], *, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `ds_lvx.models.contract.Family.frames`.

        Returns:
            ``images_per_sample`` int64 ``[B]``, and ``pixel_values`` ``[images, 3, side, side]``
            where this rank has some.
        """
        made = [[self.pixels(picture).to(dtype) for picture in sample] for sample in pictures]
        found = {COUNTS: torch.tensor([len(sample) for sample in made])}
        images = [image for sample in made for image in sample]
        return {**found, PIXELS: torch.stack(images)} if images else found


class _Table(TikTokenConverter):
    """A table of tokens as a fast tokenizer, without the package ``tiktoken``."""

    @staticmethod
    def load_tiktoken_bpe(path: str) -> dict[bytes, int]:
        """The tokens by their ranks."""
        rows = (line.split() for line in Path(path).read_bytes().splitlines() if line)
        return {b64decode(token): int(rank) for token, rank in rows}


def _of_table(name: str) -> PreTrainedTokenizerFast:
    path = cached_file(name, _TABLE, _raise_exceptions_for_missing_entries=False)
    if path is None:
        raise ValueError(
            f"got {name}, which has neither {_TABLE} nor tokenizer.json; expected one of them, as "
            "the checkpoints have it"
        )
    made = _Table(vocab_file=path, pattern=_PATTERN, extra_special_tokens=SPECIAL).converted()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")
