"""Triton's kernels for what is else a row of PyTorch's operations: where, and how they load."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from ds_lvx.kernels.device import AMPERE


def launches_triton(tensor: Tensor) -> bool:
    """Whether Triton's kernels do what is otherwise a row of PyTorch's operations."""
    return tensor.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor >= AMPERE and find_spec("triton") is not None


def triton_parts() -> ModuleType:
    """`ds_lvx.kernels.triton_parts`, imported late.

    Triton takes a second to import, and decides then whether to interpret.
    """
    return import_module("ds_lvx.kernels.triton_parts")
