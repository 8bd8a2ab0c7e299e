"""What kernels ask of the device that a tensor lies on."""

from __future__ import annotations

import torch
from torch import Tensor

AMPERE, HOPPER, BLACKWELL = 80, 90, 100
"""Compute capabilities."""


def capability(tensor: Tensor) -> int:
    """The compute capability of a tensor's GPU, such as 90 for 9.0; 0 elsewhere."""
    if tensor.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def shared_bytes(tensor: Tensor) -> int:
    """Shared memory that a block may have on a tensor's GPU; 0 where PyTorch does not say it."""
    properties = torch.cuda.get_device_properties(tensor.device)
    return int(getattr(properties, "shared_memory_per_block_optin", 0))


def processors(tensor: Tensor) -> int:
    """How many multiprocessors a tensor's GPU has; 1 elsewhere, as for Triton's interpreter."""
    if tensor.device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
