"""How long a function takes on a device: CUDA events, or the clock of a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ds_lvx.compare.memory.measure import spread

LEAST_SAMPLES = 5
_FLUSHED_BYTES = 2**29  # no card's L2 is half as large


@dataclass(frozen=True)
class Samples:
    """Seconds of every repeat.

    Attributes:
        device_s: from the function's first to its last work on the device.
        host_s: until the function returned; on CUDA its work may still be under way then.
    """

    device_s: list[float]
    host_s: list[float]

    def record(self) -> dict[str, Any]:
        """Medians, 10th and 90th percentiles and samples, for JSON."""
        return {"device_s": spread(self.device_s), "host_s": spread(self.host_s)}


class Clock(Protocol):
    """Times functions on one device."""

    source: str

    def once(self, run: Callable[[], Any]) -> float:
        """Seconds of one run, when everything before it is done."""
        ...

    def samples(self, run: Callable[[], Any], repeats: int) -> Samples:
        """So many runs, one after the other."""
        ...


class CudaClock:
    """CUDA events around every run. Before each, a write of 512 MiB empties the L2 cache.

    The host enqueues all runs without waiting. The write also keeps the device busy while the host
    enqueues what comes next, so that a short kernel's time is not that of its launch.
    """

    source = "CUDA events, L2 flushed before each run"

    def __init__(self) -> None:
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")

    def once(self, run: Callable[[], Any]) -> float:
        """See `Clock.once`."""
        return self.samples(run, 1).device_s[0]

    def samples(self, run: Callable[[], Any], repeats: int) -> Samples:
        """See `Clock.samples`."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats)]
        pairs = list(zip(events[::2], events[1::2], strict=True))
        host_s = []
        torch.cuda.synchronize()
        for start, end in pairs:
            self._flushed.zero_()
            start.record()
            begun = time.perf_counter()
            run()
            host_s.append(time.perf_counter() - begun)
            end.record()
        torch.cuda.synchronize()
        return Samples([start.elapsed_time(end) / 1e3 for start, end in pairs], host_s)


class CpuClock:
    """time.perf_counter around every run."""

    source = "time.perf_counter"

    def once(self, run: Callable[[], Any]) -> float:
        """See `Clock.once`."""
        return self.samples(run, 1).device_s[0]

    def samples(self, run: Callable[[], Any], repeats: int) -> Samples:
        """See `Clock.samples`."""
        seconds = []
        for _ in range(repeats):
            begun = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begun)
        return Samples(seconds, list(seconds))


def clock_of(device: torch.device) -> Clock:
    """The clock for a device."""
    return CudaClock() if device.type == "cuda" else CpuClock()


def timed(clock: Clock, run: Callable[[], Any], *, repeats: int, seconds: float) -> Samples:
    """Samples of a function that has run before.

    Args:
        clock: of its device.
        run: the function.
        repeats: at most.
        seconds: that all samples together should take; at least five are taken, or ``repeats``.
    """
    fit = int(seconds / max(clock.once(run), 1e-9))
    return clock.samples(run, max(min(fit, repeats), min(LEAST_SAMPLES, repeats)))


def measured_rates(clock: Clock, device: torch.device, *, quick: bool) -> Mapping[str, Any]:
    """What the device reaches: a bf16 matrix product, and a copy of its memory.

    Args:
        clock: of the device.
        device: where.
        quick: small ones, to try it.

    Returns:
        ``matrix_flops`` (of a product of two square matrices) and ``memory_bytes_per_s`` (read and
        written), by their medians, their sizes and every sample.
    """
    size, copied = (256, 2**22) if quick else (8192, 2**31)
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for _ in range(3):  # clocks rise, libraries load
        torch.mm(a, b, out=product)
        target.copy_(source)
    products = spread(clock.samples(lambda: torch.mm(a, b, out=product), 20).device_s)
    copies = spread(clock.samples(lambda: target.copy_(source), 20).device_s)
    return {
        "matrix_size": size,
        "matrix_s": products,
        "matrix_flops": 2 * size**3 / products["median"],
        "copied_bytes": copied,
        "copy_s": copies,
        "memory_bytes_per_s": 2 * copied / copies["median"],
    }
