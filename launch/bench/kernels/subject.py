"""The subject of ``launch/bench_kernels.py``: attention kernels side by side on one device.

Trials run in a process of their own, one after the other. A candidate may end it (an illegal
address, after which CUDA does nothing more) or hang; the next trial then gets a new process.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from typing import Any

from bench.kernels.candidates import OURS, SAME
from bench.kernels.cases import DIRECTIONS, KernelCase
from bench.kernels.roofline import floor
from bench.kernels.trial import Bench, Timing, Trial
from ds_lvx.compare.harness import RunError

LIMIT_S = 60.0
"""Of one candidate on one case, compiling included; longer is taken for hanging."""
_START_S = 600.0  # imports, on a machine that has much else to do


def trials_of(
    cases: Sequence[KernelCase], candidates: Sequence[str], only: Sequence[str] = ()
) -> list[Trial]:
    """What is measured, in order: all cases by all candidates, forward and backward.

    ``only`` are shell patterns on names such as ``mllama-192/triton/forward``; none: everything.

    Raises:
        ValueError: a pattern that matches nothing.
    """
    trials = [
        Trial(*each)
        for each in product(cases, candidates, DIRECTIONS)
        if each[1:] not in SAME  # has another's code there
    ]
    names = [trial.name for trial in trials]
    matching = {pattern: fnmatch.filter(names, pattern) for pattern in only or ("*",)}
    for pattern, found in matching.items():
        if not found:
            raise ValueError(
                f"--only: got {pattern!r}, which matches nothing; expected a pattern for "
                f"CASE/CANDIDATE/DIRECTION, with the cases {', '.join(c.name for c in cases)}, the "
                f"candidates {', '.join(candidates)}, and forward or backward"
            )
    wanted = {name for found in matching.values() for name in found}
    return [trial for trial in trials if trial.name in wanted]


class Worker:
    """A process with a bench, which ``make`` makes in it; a call that finds none begins one."""

    def __init__(self, make: Callable[[Timing], Any], timing: Timing) -> None:
        self._bench = (make, timing)
        self._context: Any = get_context(timing.start)
        self._process: Any = None
        self._pipe: Any = None

    def ask(self, method: str, *arguments: Any, limit_s: float = LIMIT_S) -> Any:
        """What a method of the bench returns.

        Raises:
            RunError: the process ended, or took longer than ``limit_s``; it is gone then.
        """
        if self._process is None:
            self._pipe, theirs = self._context.Pipe()
            bench = (theirs, *self._bench)
            self._process = self._context.Process(target=_serve, args=bench, daemon=True)
            self._process.start()
            theirs.close()
            self._answer(_START_S)
        return self._answer(limit_s, (method, arguments))

    def _answer(self, limit_s: float, *questions: Any) -> Any:
        problem = f"was not done after {limit_s:.0f} s"
        try:
            for question in questions:
                self._pipe.send(question)
            if self._pipe.poll(limit_s):
                return self._pipe.recv()
        except (EOFError, ConnectionError):
            problem = "ended"
        self.end()
        raise RunError(f"the process {problem}; its output stands above")

    def end(self) -> None:
        """End the process, where there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
        self._process = None


def _serve(pipe: Any, make: Callable[[Timing], Any], timing: Timing) -> None:
    """In the process: answer what its bench is asked; an exception ends it."""
    bench = make(timing)
    pipe.send("ready")
    while True:
        method, arguments = pipe.recv()
        pipe.send(getattr(bench, method)(*arguments))


def measure(
    trials: Sequence[Trial], timing: Timing, *, make: Callable[[Timing], Any] = Bench
) -> Iterator[Mapping[str, Any]]:
    """Measure trials, one after the other, whatever they do to the process.

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
            record = {"status": "left out", "reason": "the time of the whole run was over"}
            if time.time() <= deadline:
                record = _result(worker, trial)
            yield {
                "name": trial.name,
                "case": asdict(trial.case),
                "candidate": trial.candidate,
                "ours": trial.candidate in OURS,
                "direction": trial.direction,
                **with_rates(trial, record, rates),
            }
    finally:
        worker.end()


def _result(worker: Worker, trial: Trial) -> dict[str, Any]:
    """A trial's record, with a process that serves the next one."""
    try:
        record: dict[str, Any] = worker.ask("record", trial)
    except RunError as error:
        return {"status": "failed", "reason": str(error)}
    with suppress(RunError):  # CUDA did nothing more in it: the next trial has a new one
        worker.ask("tidy")
    return record


def with_rates(trial: Trial, record: Mapping[str, Any], rates: Mapping[str, Any]) -> dict[str, Any]:
    """A record with what its time means.

    Adds, where there is a time, ``flops`` and ``memory_bytes`` (`bench.kernels.roofline`),
    ``tflops_per_s``, both as shares of the device's measured rates, ``floor_s`` at these rates, and
    ``bound``: which of them the floor comes from.
    """
    if record["status"] != "ok":
        return dict(record)
    work = trial.case.work(trial.direction)
    seconds = record["device_s"]["median"]
    matrix_flops, bytes_per_s = rates["matrix_flops"], rates["memory_bytes_per_s"]
    least = floor(work, matrix_flops, bytes_per_s)
    return {
        **record,
        **work._asdict(),
        "tflops_per_s": work.flops / seconds / 1e12,
        "share_of_matrix_rate": work.flops / seconds / matrix_flops,
        "share_of_memory_rate": work.memory_bytes / seconds / bytes_per_s,
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
