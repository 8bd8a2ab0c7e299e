"""The subject of ``launch/bench_kernels.py``: attention kernels side by side on one device."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

from ds_lvx.compare.fresh import RunError
from ds_lvx.compare.kernels.candidates import OURS
from ds_lvx.compare.kernels.cases import DIRECTIONS, KernelCase
from ds_lvx.compare.kernels.trial import RATES, Timing, Trial, Worker, failed, left_out, serve
from ds_lvx.plan.roofline import floor


@dataclass(frozen=True)
class MeasuredRates:
    """What a device reached; a `ds_lvx.plan.roofline.Rates`."""

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
    ]
    for pattern in only:
        if not fnmatch.filter([trial.name for trial in trials], pattern):
            raise ValueError(
                f"--only: got {pattern!r}, which matches nothing; expected a pattern for "
                f"CASE/CANDIDATE/DIRECTION, with the cases {', '.join(c.name for c in cases)}, the "
                f"candidates {', '.join(candidates)}, and forward or backward"
            )
    return [each for each in trials if not only or any(fnmatch.fnmatch(each.name, p) for p in only)]


def measure(
    trials: Sequence[Trial],
    timing: Timing,
    *,
    serve: Callable[[Connection, Timing], None] = serve,
) -> Iterator[Mapping[str, Any]]:
    """Measure trials, one after the other, whatever they do to the process.

    Args:
        trials: what to measure.
        timing: how.
        serve: answers in the process; a test may give another.

    Yields:
        The device's rates, then a record a trial, as soon as it is there.

    Raises:
        RunError: a process could not begin.
    """
    deadline = time.time() + timing.budget_s
    worker = Worker(serve, timing)
    try:
        yield worker.ask(RATES)
        for trial in trials:
            about = {
                "name": trial.name,
                "case": asdict(trial.case),
                "keys": trial.case.keys,
                "candidate": trial.candidate,
                "ours": trial.candidate in OURS,
                "direction": trial.direction,
            }
            if time.time() > deadline:
                yield {**about, **left_out("the time of the whole run was over")}
                continue
            worker = worker if worker.is_ready else Worker(serve, timing)
            try:
                yield {**about, **worker.ask(trial)}
            except RunError as error:
                yield {**about, **failed(str(error))}
    finally:
        worker.end()


def with_rates(record: Mapping[str, Any], rates: Mapping[str, Any]) -> dict[str, Any]:
    """A record with what its time means.

    Adds, where there is a time, ``flops`` and ``memory_bytes`` (`ds_lvx.plan.roofline`),
    ``tflops_per_s``, both as shares of the device's measured rates, ``floor_s`` at these rates, and
    ``bound``: which of them the floor comes from.
    """
    if record["status"] != "ok":
        return dict(record)
    work = KernelCase(**record["case"]).work(record["direction"])
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


def comparisons(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Ours against the best of the others, by case and direction, by medians.

    ``best_peer`` and ``best`` are ``[name, seconds]`` or None; ``times_best_peer`` is how many
    times as fast as the best peer each of ours is; ``auto_over_best`` how much longer ``auto``
    takes than the best of all, as a share.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        case = KernelCase(**record["case"]).name
        groups.setdefault((case, record["direction"]), []).append(record)
    found = []
    for (case, direction), group in groups.items():
        times = {r["candidate"]: r["device_s"]["median"] for r in group if r["status"] == "ok"}
        peers = {name: seconds for name, seconds in times.items() if name not in OURS}
        best, best_peer = _least(times), _least(peers)
        ratios = {name: best_peer[1] / times[name] for name in OURS if name in times and best_peer}
        auto = times.get("auto")
        found.append(
            {
                "case": case,
                "direction": direction,
                "best_peer": best_peer,
                "best": best,
                "times_best_peer": ratios,
                "auto_over_best": None if auto is None or best is None else auto / best[1] - 1.0,
            }
        )
    return found


def faults(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of ours that are wrong or fail, for another reason than too little memory."""
    return [
        record["name"]
        for record in records
        if record["ours"]
        and record["status"] in ("wrong", "failed")
        and "OutOfMemoryError" not in record["reason"]
    ]


def _least(times: Mapping[str, float]) -> tuple[str, float] | None:
    return min(times.items(), key=lambda pair: pair[1], default=None)
