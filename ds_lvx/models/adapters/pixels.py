"""Pixels as CLIP's towers take them, of whole pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

_SCALES = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


def whole_picture(picture: Any, side: int) -> Tensor:
    """A PIL image resized whole to a square, and normalised, ``[3, side, side]``."""
    resized = picture.convert("RGB").resize((side, side), resample=3)  # bicubic
    raw = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    pixels = raw.view(side, side, 3).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(each)[:, None, None] for each in _SCALES)
    return (pixels - mean) / std
