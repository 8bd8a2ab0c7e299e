"""Rotary embeddings of this rank's tokens, by their places in the whole."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``[B, s, H, D]`` by halves, ``cos`` and ``sin`` ``[B or 1, s, D]``."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos.unsqueeze(2) + turned * sin.unsqueeze(2)).to(x.dtype)
