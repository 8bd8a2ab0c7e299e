"""A worker of the kernel benchmark that ends in the middle of `triton` and after `native`."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from signal import pause

from ds_lvx.compare.kernels.trial import RATES, Timing


def serve(pipe: Connection, timing: Timing) -> None:
    """Do what `ds_lvx.compare.kernels.trial.serve` does, without PyTorch."""
    while True:
        pipe.send("ready")
        trial = pipe.recv()
        if trial == RATES:
            pipe.send({"matrix_flops": 1.0, "memory_bytes_per_s": 1.0})
            continue
        if (trial.candidate, trial.direction) == ("triton", "forward"):
            os._exit(3)
        pipe.send({"status": "left out", "reason": "a test"})
        if (trial.candidate, trial.direction) == ("native", "backward"):
            os._exit(4)  # as if CUDA were broken behind this one


def refuse(pipe: Connection, timing: Timing) -> None:
    """End before anything began."""
    os._exit(5)


def hang(pipe: Connection, timing: Timing) -> None:
    """Take a trial and never answer."""
    pipe.send("ready")
    pipe.recv()
    while True:
        pause()
