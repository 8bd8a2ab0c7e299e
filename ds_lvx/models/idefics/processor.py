"""Text and pixels for idefics by its own processor, a picture at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor

from ds_lvx.models.idefics.batch import PIXELS, SEEN
from ds_lvx.models.visual import unwritten

IMAGE_TOKEN = "<image>"
AROUND = "<fake_token_around_image>"


class Processor:
    """transformers' `IdeficsProcessor`, with the names that tools ask for.

    Args:
        own: that processor.
    """

    image_token = IMAGE_TOKEN

    def __init__(self, own: Any) -> None:
        self.own, self.tokenizer = own, own.tokenizer
        self.image_token_id = int(own.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        self.chat_template = getattr(own, "chat_template", None)

    @classmethod
    def of(cls, name: str) -> Processor:
        """That of a checkpoint, from a folder or the hub."""
        return cls(AutoProcessor.from_pretrained(name))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `of` reads."""
        self.own.save_pretrained(folder)


def media_text(times: Sequence[float] | None) -> str:
    """An image, or the frames of a video, as the processor writes images side by side."""
    return AROUND + (IMAGE_TOKEN + AROUND) * (1 if times is None else len(times))


def latest_images(
    input_ids: Tensor, *, image: int, end: int | None, begins: Tensor | None = None
) -> Tensor:
    """The image that each token sees by the rule of idefics's processor, without its mask.

    A token sees the latest image so far; behind an end of text it sees none until the next image.

    Args:
        input_ids: int ``[B, T]``, the whole text.
        image, end: ids of the image token and of the end of a text; None: there is none.
        begins: bool ``[B, T]``, where a sample begins in its row; None: each has its own.

    Returns:
        int32 ``[B, T, 2]``: the image, and one past it; both 0 where it is none.

    Source: transformers, ``processing_idefics.image_attention_mask_for_packed_input_ids``.
    """
    is_image = input_ids == image
    number = is_image.cumsum(dim=1)
    places = torch.arange(1, input_ids.shape[1] + 1)
    latest = torch.where(is_image, places, 0).cummax(dim=1).values
    ends = torch.zeros_like(latest)
    if end is not None:
        ends = torch.where(input_ids == end, places, 0).cummax(dim=1).values
    ends = torch.nn.functional.pad(ends[:, :-1], (1, 0))
    if begins is not None:
        ends = torch.maximum(ends, torch.where(begins, places, 0).cummax(dim=1).values)
    ended = ends > latest
    seen = torch.stack([number - 1, number], dim=-1)
    return seen.masked_fill((ended | (number == 0))[..., None], 0).to(torch.int32)


def frames(
    processor: Processor,
    input_ids: Tensor,
    pictures: Sequence[Iterable[Any]],
    *,
    count: int,
    dtype: torch.dtype,
    begins: Tensor | None = None,
    first: int = 0,
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.frames`, and ``packed_frames``, which has ``begins``; and
    ``first``, which says nothing here.

    Returns:
        ``visible_images`` int32 ``[B, T, 2]`` and ``pixel_values`` ``[B, count, 3, size, size]``.
    """
    images = processor.own.image_processor
    side = int(images.image_size)
    pixels = unwritten((len(pictures), count, 3, side, side), dtype)
    for row, sample in enumerate(pictures):
        for place, picture in enumerate(sample):
            pixels[row, place] = images([picture], return_tensors="pt")[0]
    end = processor.tokenizer.eos_token_id
    seen = latest_images(input_ids, image=processor.image_token_id, end=end, begins=begins)
    return {SEEN: seen, PIXELS: pixels}
