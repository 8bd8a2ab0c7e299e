"""oneDNN's fp32 matrix products on a CPU, where they are faster than those PyTorch takes.

PyTorch hands fp32 products to MKL, whose code for AVX-512 runs on Intel's processors only. With
its setting for products in bf16 it hands them to oneDNN, which rounds to bf16 where the processor
has AMX, and elsewhere computes in fp32 as asked (its ``brg_matmul:avx512_core``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


@cache
def serves() -> bool:
    """Whether oneDNN takes fp32 products on this processor, and does them in fp32: by trial."""
    if not (
        torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    ):
        return False
    third = torch.full((1, 64, 64), 1.0 / 3.0, dtype=torch.float32, device="cpu")
    with _setting("bf16"), torch.autocast("cpu", enabled=False):
        found = torch.bmm(third, third)
    exact = torch.bmm(third.double(), third.double())
    return torch.allclose(found.double(), exact, rtol=1e-6, atol=0.0)


@contextmanager
def products() -> Iterator[None]:
    """fp32 products by oneDNN meanwhile, where it `serves`.

    The setting is the process's. What another thread multiplies meanwhile is as exact.
    """
    if serves():
        with _setting("bf16"):
            yield
    else:
        yield


@contextmanager
def _setting(precision: str) -> Iterator[None]:
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
