"""A model small enough to train on a CPU in seconds."""

from __future__ import annotations

from typing import Any

import torch

from digits.data import config
from ds_lvx.models import FAMILIES


def tiny_model(seed: int) -> Any:
    """Four text layers, two of them cross-attention, and two vision layers, randomly initialised.

    The same seed gives the same weights. The gates are open, as in downloaded weights; shut, as in
    a new model, no frame would be seen at first.
    """
    torch.manual_seed(seed)
    return FAMILIES.default().build(config(), gate=1.0, dtype=torch.float32)
