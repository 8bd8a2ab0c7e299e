"""How much memory a process uses and has used at most: the allocator's count, or the kernel's.

On CUDA PyTorch's allocator counts every tensor. On a CPU it does not, so there the process's own
resident memory is read (`VmRSS`, `VmHWM`), which counts everything that the process touched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

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


class Meter(Protocol):
    """Reads the memory of this process on one device."""

    source: str

    def reset(self) -> None:
        """Begin a new peak: from what is in use now."""
        ...

    def now_bytes(self) -> int:
        """What is in use now."""
        ...

    def peak_bytes(self) -> int:
        """The most that was in use since `reset`."""
        ...


def meter() -> Meter:
    """The meter of the device that this process computes on: its current GPU, or the CPU.

    Raises:
        NotImplementedError: on a CPU whose operating system has no ``/proc/self/clear_refs``.
    """
    if torch.cuda.is_available():
        return AllocatedMemory()
    if not (_STATUS.exists() and _CLEAR.exists()):
        raise NotImplementedError(
            "got a CPU without /proc/self/clear_refs; expected Linux, which can tell a process its "
            "own peak of resident memory, or a CUDA device"
        )
    return ResidentMemory()


class AllocatedMemory:
    """What PyTorch's CUDA allocator has handed out on the current device."""

    source = "torch.cuda.max_memory_allocated"

    def reset(self) -> None:
        """See `Meter.reset`."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def now_bytes(self) -> int:
        """See `Meter.now_bytes`."""
        return int(torch.cuda.memory_allocated())

    def peak_bytes(self) -> int:
        """See `Meter.peak_bytes`."""
        return int(torch.cuda.max_memory_allocated())


class ResidentMemory:
    """This process's resident memory, as Linux counts it."""

    source = "VmHWM of the process, set back by /proc/self/clear_refs before each step"

    def reset(self) -> None:
        """See `Meter.reset`."""
        _CLEAR.write_text("5")

    def now_bytes(self) -> int:
        """See `Meter.now_bytes`."""
        return _status("VmRSS")

    def peak_bytes(self) -> int:
        """See `Meter.peak_bytes`."""
        return _status("VmHWM")


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"got a {_STATUS} without {field}; expected Linux's")
