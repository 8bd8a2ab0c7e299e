"""The subject of ``launch/bench_kernels.py``: attention kernels side by side on one device.

Trials run in a process of their own, one after the other. A candidate may end it (an illegal
address, after which CUDA does nothing more) or hang; the next trial then gets a new process.
"""

from __future__ import annotations

import fnmatch
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context
from typing import Any, NamedTuple

from ds_lvx.compare.fresh import RunError
from ds_lvx.compare.kernels.candidates import OURS, SAME
from ds_lvx.compare.kernels.cases import DIRECTIONS, KernelCase
from ds_lvx.compare.kernels.roofline import floor
from ds_lvx.compare.kernels.trial import Bench, Timing, Trial

LIMIT_S = 60.0
"""Of one candidate on one case, compiling included; longer is taken for hanging."""
_START_S = 600.0  # imports, on a machine that has much else to do


class MeasuredRates(NamedTuple):
    """What a device reached; a `ds_lvx.compare.kernels.roofline.Rates`."""

    matrix_flops: float
    memory_bytes_per_s: float


def trials_of(
    cases: Sequence[KernelCase], candidates: Sequence[str], only: Sequence[str] = ()
) -> list[Trial]:
    """What is measured, in order.

    Args:
        cases: shapes.
        candidates: names.
        only: shell patterns on names such as ``mllama-192/triton/forward``; none: everything.

    Raises:
        ValueError: a pattern that matches nothing.
    """
    trials = [
        Trial(case, candidate, direction)
        for case in cases
        for candidate in candidates
        for direction in DIRECTIONS
        if (candidate, direction) not in SAME
    ]
    for pattern in only:
        if not fnmatch.filter([trial.name for trial in trials], pattern):
            raise ValueError(
                f"--only: got {pattern!r}, which matches nothing; expected a pattern for "
                f"CASE/CANDIDATE/DIRECTION, with the cases {', '.join(c.name for c in cases)}, the "
                f"candidates {', '.join(candidates)}, and forward or backward"
            )
    return [each for each in trials if not only or any(fnmatch.fnmatch(each.name, p) for p in only)]


class Worker:
    """A process with a bench; a new one begins where a call finds none.

    Args:
        make: makes the bench, in the process.
        timing: for it.
    """

    def __init__(self, make: Callable[[Timing], Any], timing: Timing) -> None:
        self._bench = (make, timing)
        self._context: Any = get_context(timing.start)
        self._pool: ProcessPoolExecutor | None = None
        self._process: int | None = None

    def ask(self, method: str, *arguments: Any, limit_s: float = LIMIT_S) -> Any:
        """What a method of the bench returns.

        Raises:
            RunError: the process ended, or took longer than ``limit_s``; it is gone then.
        """
        try:
            if self._pool is None:
                self._pool = ProcessPoolExecutor(1, mp_context=self._context)
                self._process = self._pool.submit(_begin, *self._bench).result(_START_S)
            return self._pool.submit(_answer, *self._bench, method, *arguments).result(limit_s)
        except BrokenProcessPool:
            self._process = None
            problem = "ended"
        except TimeoutError:
            problem = f"was not done after {limit_s:.0f} s"
        self.end()
        raise RunError(f"the process {problem}; its output stands above")

    def end(self) -> None:
        """End the process, where there is one."""
        if self._process is not None:
            os.kill(self._process, signal.SIGKILL)
        if self._pool is not None:
            self._pool.shutdown(wait=self._process is not None)
        self._pool = self._process = None


@cache
def _bench(make: Callable[[Timing], Any], timing: Timing) -> Any:
    return make(timing)


def _begin(make: Callable[[Timing], Any], timing: Timing) -> int:
    """In the process: make its bench; the process's number."""
    _bench(make, timing)
    return os.getpid()


def _answer(make: Callable[[Timing], Any], timing: Timing, method: str, *arguments: Any) -> Any:
    """In the process: ask its bench."""
    return getattr(_bench(make, timing), method)(*arguments)


def measure(
    trials: Sequence[Trial], timing: Timing, *, make: Callable[[Timing], Any] = Bench
) -> Iterator[Mapping[str, Any]]:
    """Measure trials, one after the other, whatever they do to the process.

    Args:
        trials: what to measure.
        timing: how.
        make: makes the bench in the process; a test may give another.

    Yields:
        The device's rates, then a record a trial `with_rates`, as soon as it is there.

    Raises:
        RunError: the process could not begin.
    """
    deadline = time.time() + timing.budget_s
    worker = Worker(make, timing)
    try:
        rates = worker.ask("rates")
        yield rates
        for trial in trials:
            about = {
                "name": trial.name,
                "case": asdict(trial.case),
                "candidate": trial.candidate,
                "ours": trial.candidate in OURS,
                "direction": trial.direction,
            }
            if time.time() > deadline:
                reason = "the time of the whole run was over"
                yield {**about, "status": "left out", "reason": reason}
                continue
            try:
                yield {**about, **with_rates(trial, worker.ask("record", trial), rates)}
            except RunError as error:
                yield {**about, "status": "failed", "reason": str(error)}
                continue
            try:
                worker.ask("tidy")
            except (RunError, RuntimeError):  # CUDA does nothing more in this process
                worker.end()
    finally:
        worker.end()


def with_rates(trial: Trial, record: Mapping[str, Any], rates: Mapping[str, Any]) -> dict[str, Any]:
    """A record with what its time means.

    Adds, where there is a time, ``flops`` and ``memory_bytes`` (`ds_lvx.compare.kernels.roofline`),
    ``tflops_per_s``, both as shares of the device's measured rates, ``floor_s`` at these rates, and
    ``bound``: which of them the floor comes from.
    """
    if record["status"] != "ok":
        return dict(record)
    work = trial.case.work(trial.direction)
    seconds = record["device_s"]["median"]
    reached = MeasuredRates(rates["matrix_flops"], rates["memory_bytes_per_s"])
    least = floor(work, reached)
    return {
        **record,
        "flops": work.flops,
        "memory_bytes": work.memory_bytes,
        "tflops_per_s": work.flops / seconds / 1e12,
        "share_of_matrix_rate": work.flops / seconds / reached.matrix_flops,
        "share_of_memory_rate": work.memory_bytes / seconds / reached.memory_bytes_per_s,
        "floor_s": least.seconds,
        "bound": least.bound,
    }


def faults(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of ours that are wrong or fail, for another reason than too little memory."""
    return [
        record["name"]
        for record in records
        if record["ours"]
        and record["status"] in ("wrong", "failed")
        and "OutOfMemoryError" not in record["reason"]
    ]
