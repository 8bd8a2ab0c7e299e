"""Text and pixels for T5Gemma2 by its own processor, Gemma 3's, a picture at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor

from ds_lvx.models.t5gemma2.batch import DECODER
from ds_lvx.models.visual import COUNTS, PIXELS


class Processor:
    """transformers' `Gemma3Processor`, with the names that tools ask for.

    An image is one token in the text until that is read: its visual tokens follow then.

    Args:
        own: that processor.
    """

    def __init__(self, own: Any) -> None:
        self.own, self.tokenizer = own, own.tokenizer
        self.image_token: str = own.tokenizer.boi_token
        self.image_token_id = int(own.tokenizer.boi_token_id)
        self.chat_template = getattr(own, "chat_template", None)

    @classmethod
    def of(cls, name: str) -> Processor:
        """That of a checkpoint, from a folder or the hub."""
        return cls(AutoProcessor.from_pretrained(name))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `of` reads."""
        self.own.save_pretrained(folder)


def media_text(processor: Processor, times: Sequence[float] | None) -> str:
    """An image, or the frames of a video, as the processor writes each; without visual tokens."""
    tokenizer = processor.tokenizer
    image = f"\n\n{tokenizer.boi_token}{tokenizer.eoi_token}\n\n"
    return image * (1 if times is None else len(times))


def inputs(
    processor: Processor, input_ids: Sequence[int], labels: Sequence[int]
) -> dict[str, list[int]]:
    """See `ds_lvx.models.contract.Family.inputs`: encoder and decoder share a conversation.

    The encoder reads what stands before the first answer, the decoder all that follows; of that,
    answers are learnt. Where no answer is, the encoder reads all, and the decoder is to begin.

    Raises:
        ValueError: nothing stands before the answer, or an image behind it.
    """
    learnt = (place for place, label in enumerate(labels) if label >= 0)
    first = next(learnt, len(labels))
    read, said = input_ids[:first], input_ids[first:]
    if first == 0 or processor.image_token_id in said:
        got = "nothing before the first answer" if first == 0 else "an image behind an answer"
        raise ValueError(
            f"got {got}; expected all images, and some text, before the first answer: the decoder "
            "reads text only"
        )
    visual = [int(processor.tokenizer.image_token_id)] * int(processor.own.image_seq_length)
    ids: list[int] = []
    for token in read:
        ids.append(token)
        if token == processor.image_token_id:
            ids += visual
    decoder = [int(processor.tokenizer.bos_token_id), *said[:-1]]
    made = {"input_ids": ids, f"{DECODER}input_ids": decoder}
    return {**made, "labels": list(labels[first:])} if said else made


def frames(
    processor: Processor, pictures: Sequence[Iterable[Any]], *, dtype: torch.dtype
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.frames`.

    Returns:
        ``pixel_values`` ``[images, 3, size, size]``, where there are any, and ``images_per_sample``
        int64 ``[B]``.
    """
    images = processor.own.image_processor
    made = [
        [images([each], return_tensors="pt")["pixel_values"][0].to(dtype) for each in sample]
        for sample in pictures
    ]
    counts = {COUNTS: torch.tensor([len(sample) for sample in made])}
    pixels = [each for sample in made for each in sample]
    return {**counts, PIXELS: torch.stack(pixels)} if pixels else counts
