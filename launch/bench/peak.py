"""How much memory a process uses and has used at most: the allocator's count, or the kernel's.

On CUDA PyTorch's allocator counts every tensor. On a CPU it does not, so there the process's own
resident memory is read (`VmRSS`, `VmHWM`), which counts everything that the process touched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

# glibc keeps freed memory for later by default, and a process's resident memory would show tensors
# that are long gone. With these, one of 64 KiB or more is mapped alone and goes back at once.
PROMPT_FREEING = {
    "MALLOC_MMAP_THRESHOLD_": str(2**16),
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}


class Meter(NamedTuple):
    """Reads the memory of this process on one device."""

    source: str  # where from
    reset: Callable[[], object]  # begins a new peak, from what is in use now
    now_bytes: Callable[[], int]  # what is in use now
    peak_bytes: Callable[[], int]  # the most that was in use since `reset`


def meter(device: str | None = None) -> Meter:
    """The meter of ``"cuda"`` or ``"cpu"``; None is what this process computes on.

    Raises:
        NotImplementedError: on a CPU whose operating system has no ``/proc/self/clear_refs``.
    """
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        return Meter(
            "torch.cuda.max_memory_allocated",
            torch.cuda.reset_peak_memory_stats,
            torch.cuda.memory_allocated,
            torch.cuda.max_memory_allocated,
        )
    if not (_STATUS.exists() and _CLEAR.exists()):
        raise NotImplementedError(
            "got a CPU without /proc/self/clear_refs; expected Linux, which can tell a process its "
            "own peak of resident memory, or a CUDA device"
        )
    return Meter(
        "VmHWM of the process, set back by /proc/self/clear_refs before each step",
        partial(_CLEAR.write_text, "5"),
        partial(_status_bytes, "VmRSS"),
        partial(_status_bytes, "VmHWM"),
    )


def _status_bytes(field: str) -> int:
    lines = (line.partition(":") for line in _STATUS.read_text().splitlines())
    return {name: int(value.split()[0]) * 1024 for name, _, value in lines if name == field}[field]
