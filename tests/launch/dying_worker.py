"""Benches of the kernel benchmark that end their process, or hang."""

from __future__ import annotations

import os
from signal import pause
from typing import Any

from bench.kernels.trial import Timing, Trial


class Dying:
    """Ends the process in the middle of `triton`'s forward, and after `native`'s backward."""

    def __init__(self, timing: Timing) -> None:
        self._last = ("", "")

    def rates(self) -> dict[str, float]:
        return {"matrix_flops": 1.0, "memory_bytes_per_s": 1.0}

    def record(self, trial: Trial) -> dict[str, Any]:
        self._last = trial.candidate, trial.direction
        if self._last == ("triton", "forward"):
            os._exit(3)
        return {"status": "left out", "reason": "a test"}

    def tidy(self) -> None:
        if self._last == ("native", "backward"):
            os._exit(4)  # as if CUDA were broken behind this one


def refuse(timing: Timing) -> Any:
    """End before anything began."""
    os._exit(5)


class Hanging(Dying):
    """Takes a trial and never answers."""

    def record(self, trial: Trial) -> dict[str, Any]:
        while True:
            pause()
