"""Scikit-learn's handwritten digits as the frames of multimodal sequences. Nothing is downloaded.

A sequence is ``<|image|> 7 <|image|> 2 ...``: frames, each followed in the text by its digit. By
the rule of the model's processor a token sees the latest frame only, so that the model has to read
the digit of an image token off that one frame.

Legend: B sequences of a batch, N frames of a sequence, T = 2 N text tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ds_lvx.models import FAMILIES
from ds_lvx.models.size import Size

IMAGE_TOKEN = 10  # the digits are tokens 0 to 9
FRAME_SIZE = 32
HELD_OUT = 360
NOT_A_LABEL = -100

Batch = dict[str, Tensor]


@cache
def config() -> Any:
    """Of the model: its dimensions fit the digits."""
    size = Size(
        vocabulary=IMAGE_TOKEN,  # the image token itself is never written
        vision_hidden=64,
        vision_heads=4,
        vision_mlp=128,
        image_size=FRAME_SIZE,
        patch_size=8,
        initializer_range=0.1,
    )
    return FAMILIES.default().config(size)


@dataclass(frozen=True)
class Digits:
    """Frames ``[count, 3, 32, 32]`` between -1 and 1, and their digits ``[count]``."""

    frames: Tensor
    digits: Tensor

    def __len__(self) -> int:
        return len(self.digits)

    def batch(self, chosen: Tensor) -> Batch:
        """The batch of the frames ``chosen [B, N]``, as the model's processor would return it."""
        digits = self.digits[chosen]
        input_ids = torch.stack([torch.full_like(digits, IMAGE_TOKEN), digits], dim=2).flatten(1)
        labels = input_ids.masked_fill(input_ids == IMAGE_TOKEN, NOT_A_LABEL)
        batch = FAMILIES.default().pixel_batch(config(), input_ids, self.frames[chosen])
        return {**batch, "labels": labels}


def load() -> tuple[Digits, Digits]:
    """The digits to train on (1,437) and those held out (360): always the same."""
    from sklearn.datasets import load_digits  # whose import takes seconds

    source = load_digits()
    small = torch.from_numpy(source.images).float() / 8 - 1
    factor = FRAME_SIZE // small.shape[-1]
    large = small.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    frames = large[:, None].expand(-1, 3, -1, -1)
    digits = torch.from_numpy(source.target).long()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    held_out, training = order[:HELD_OUT], order[HELD_OUT:]
    return Digits(frames[training], digits[training]), Digits(frames[held_out], digits[held_out])


def training_batches(
    digits: Digits, *, steps: int, batch_size: int, frames: int, seed: int
) -> Iterator[Batch]:
    """``steps`` batches, the digits shuffled anew in every epoch; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    needed = batch_size * frames
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < needed:
            order = torch.cat([order, torch.randperm(len(digits), generator=generator)])
        chosen, order = order[:needed], order[needed:]
        yield digits.batch(chosen.view(batch_size, frames))


def prompts(digits: Digits, *, frames: int) -> Batch:
    """A prompt for every digit: a sequence that ends with its frame, behind others in order."""
    places = torch.arange(len(digits))
    batch = digits.batch((places[:, None] + torch.arange(1 - frames, 1)) % len(digits))
    batch["attention_mask"] = torch.ones_like(batch.pop("labels"))
    text = ("input_ids", "attention_mask", "cross_attention_mask")  # without the digit asked for
    return {key: value[:, :-1] if key in text else value for key, value in batch.items()}


def accuracy(sequences: Tensor, digits: Digits) -> float:
    """The share of `prompts` that a generation of one token ``[count, tokens]`` has read."""
    return float((sequences[:, -1].cpu() == digits.digits).float().mean())
