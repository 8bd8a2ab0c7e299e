"""From the host to the device, so that nobody waits."""

from __future__ import annotations

import torch
from torch import Tensor

HOST = torch.device("cpu")
"""``with HOST:`` what is made without a device is the host's, as bookkeeping is, whatever was told
``torch.set_default_device``. Layers, which a context would slow down, tell each tensor."""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without the host waiting for what the device is at.

    CUDA copies from pinned memory in its stream's turn. Other memory it would first have to copy to
    a place of its own, for which the host may wait: what is not pinned goes through pinned memory,
    which PyTorch keeps for the next such tensor.

    Args:
        tensor: of any shape and dtype, on the host (best pinned) or on the device.
        device: the one that computes; on a CPU nothing happens.
    """
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device, non_blocking=True)
    if not (tensor.is_contiguous() and tensor.is_pinned()):
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True, device="cpu")
        tensor = pinned.copy_(tensor)
    return tensor.to(device, non_blocking=True)
