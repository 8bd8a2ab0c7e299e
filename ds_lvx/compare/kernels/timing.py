"""Seconds of a function on one device, by the timers of Triton and of PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.benchmark import Timer

LEAST_SAMPLES = 5


def samples_s(
    run: Callable[[], Any], device: torch.device, *, repeats: int, seconds: float
) -> list[float]:
    """Seconds of a function that has run before: at most ``repeats`` samples.

    All together they should take ``seconds``; but five are taken, or ``repeats``.
    """
    measured = _on_cuda if device.type == "cuda" else _on_cpu
    once = max(_once_on_cuda(run) if device.type == "cuda" else _on_cpu(run, 0.0)[0], 1e-9)
    least = min(LEAST_SAMPLES, repeats)
    taken: list[float] = []
    while len(taken) < least:
        taken += measured(run, max(min(seconds, repeats * once), least * once))
    return taken[:repeats]


def _once_on_cuda(run: Callable[[], Any]) -> float:
    """One run by events: enough to know how many more to take."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _on_cuda(run: Callable[[], Any], seconds: float) -> list[float]:
    from triton.testing import do_bench  # Triton is not everywhere

    return [ms / 1e3 for ms in do_bench(run, warmup=0, rep=1e3 * seconds, return_mode="all")]


def _on_cpu(run: Callable[[], Any], seconds: float) -> list[float]:
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    taken: list[float] = timer.blocked_autorange(min_run_time=seconds).times
    return taken
