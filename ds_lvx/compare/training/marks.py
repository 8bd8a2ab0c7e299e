"""Moments of a step: by events on CUDA, by ranges of torch.profiler on a CPU.

On CUDA the host is far ahead of the device, so a moment is an event on the current stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from deepspeed.accelerator import get_accelerator
from torch.profiler import ProfilerActivity, profile, record_function

_NAME = "ds_lvx.mark."


class Marks(Protocol):
    """Notes the moments of one step and gives each a number."""

    def mark(self) -> int:
        """Note this moment; returns its number, from 0."""
        ...

    def read(self) -> list[float]:
        """Seconds of every moment since moment 0, by number; the step is over."""
        ...


class EventMarks:
    """Moments of the current CUDA stream."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> int:
        """See `Marks.mark`."""
        self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[-1].record()
        return len(self._events) - 1

    def read(self) -> list[float]:
        """See `Marks.read`."""
        torch.cuda.synchronize()
        return [self._events[0].elapsed_time(event) / 1e3 for event in self._events]


class ProfilerMarks:
    """Moments of this process: empty ranges in a trace of torch.profiler."""

    def __init__(self, profiler: Any) -> None:
        self._profiler = profiler
        self._count = 0

    def mark(self) -> int:
        """See `Marks.mark`."""
        number, self._count = self._count, self._count + 1
        with record_function(f"{_NAME}{number}"):
            return number

    def read(self) -> list[float]:
        """See `Marks.read`."""
        starts_us = {event.name: event.time_range.start for event in self._profiler.events()}
        moments = [starts_us[f"{_NAME}{number}"] for number in range(self._count)]
        return [(moment - moments[0]) / 1e6 for moment in moments]


@contextmanager
def marks() -> Iterator[Marks]:
    """The marks of one step, on the device that this process computes on; `read` them outside."""
    if get_accelerator().device_name() == "cuda":
        yield EventMarks()
        return
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        yield ProfilerMarks(profiler)
