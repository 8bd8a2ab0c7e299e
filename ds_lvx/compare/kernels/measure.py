"""Attention kernels side by side on one device: the run, and what its records say together.

The candidates run in a process of their own (`ds_lvx.compare.kernels.worker`), which is started
again when one of them ends it.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_lvx.compare.fresh import RunError, run_fresh
from ds_lvx.compare.kernels import worker as kernel_worker
from ds_lvx.compare.kernels.candidates import OURS
from ds_lvx.compare.kernels.cases import DIRECTIONS, KernelCase
from ds_lvx.compare.kernels.worker import Item, Request, failed
from ds_lvx.plan.roofline import floor

LIMIT_S = 60.0
"""Of one candidate on one case, compiling included; longer is taken for hanging."""

_START_S = 120.0  # of a worker, imports and the device's rates included
_FOLLOW_S = 0.2


@dataclass(frozen=True)
class Plan:
    """How kernels are measured.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        repeats: samples of a time, at most.
        seconds: that the samples of one time should take.
        budget_s: of the whole run; what has not begun then is left out.
        threads: on a CPU.
        quick: small sizes for the device's rates.
        worker: the module that measures; a test may give another.
    """

    device: str
    repeats: int = 50
    seconds: float = 0.5
    budget_s: float = 3600.0
    threads: int = 1
    quick: bool = False
    worker: str = kernel_worker.__name__


@dataclass(frozen=True)
class MeasuredRates:
    """What a device reached; a `ds_lvx.plan.roofline.Rates`."""

    matrix_flops: float
    memory_bytes_per_s: float


def items_of(
    cases: Sequence[KernelCase], candidates: Sequence[str], only: Sequence[str] = ()
) -> list[Item]:
    """What is measured, in order.

    Args:
        cases: shapes.
        candidates: names.
        only: shell patterns on names such as ``mllama-192/triton/forward``; none: everything.

    Raises:
        ValueError: a pattern that matches nothing.
    """
    items = [
        Item(case, candidate, direction)
        for case in cases
        for candidate in candidates
        for direction in DIRECTIONS
    ]
    for pattern in only:
        if not fnmatch.filter([item.name for item in items], pattern):
            raise ValueError(
                f"--only: got {pattern!r}, which matches nothing; expected a pattern for "
                f"CASE/CANDIDATE/DIRECTION, with the cases {', '.join(c.name for c in cases)}, the "
                f"candidates {', '.join(candidates)}, and forward or backward"
            )
    return [item for item in items if not only or any(fnmatch.fnmatch(item.name, p) for p in only)]


def measure(
    items: Sequence[Item], plan: Plan, *, take: Callable[[Mapping[str, Any]], None]
) -> None:
    """Measure items, one after the other, whatever they do to the process.

    Args:
        items: what to measure.
        plan: how.
        take: gets ``{"rates": ...}`` once, and ``{"record": ...}`` as soon as it is there.

    Raises:
        RunError: a worker ended before it began with anything.
    """
    deadline = time.time() + plan.budget_s
    results = _Results(items, take)
    with tempfile.TemporaryDirectory(prefix="ds_lvx_") as folder:
        while results.waiting:
            path = Path(folder) / f"{len(results.waiting)}.jsonl"
            path.touch()
            request = Request(
                items=results.waiting,
                device=plan.device,
                repeats=plan.repeats,
                seconds=plan.seconds,
                limit_s=LIMIT_S,
                deadline=deadline,
                rates=not results.have_rates,
                quick=plan.quick,
                path=str(path),
            )
            results.follow(path, functools.partial(_work, request, plan))


def _work(request: Request, plan: Plan) -> None:
    left_s = max(request.deadline - time.time(), 0.0)
    run_fresh(
        plan.worker,
        asdict(request),
        ranks=1,
        threads=plan.threads,
        timeout_s=left_s + LIMIT_S + _START_S,
    )


class _Results:
    """What has come back, and what is still to be done."""

    def __init__(self, items: Sequence[Item], take: Callable[[Mapping[str, Any]], None]) -> None:
        self.waiting = list(items)
        self.have_rates = False
        self._take = take

    def follow(self, path: Path, work: Callable[[], None]) -> None:
        """Take results from a file while a worker writes them, until it ends."""
        began: list[str] = []
        with path.open() as lines, ThreadPoolExecutor(1) as pool:
            job = pool.submit(work)
            done, text = False, ""
            while not done:
                done = job.done()  # first: what it wrote before is read below
                *whole, text = (text + lines.read()).split("\n")
                for line in whole:
                    self._result(json.loads(line), began)
                if not done:
                    time.sleep(_FOLLOW_S)
            error = job.exception()
            if error is None:
                return
            if not isinstance(error, RunError) or not began:
                raise error
        if self.waiting and self.waiting[0].name == began[-1]:
            self._finish(began[-1], failed(f"ended or hung the process: {error}"))

    def _result(self, line: Mapping[str, Any], began: list[str]) -> None:
        if "rates" in line:
            self.have_rates = True
            self._take(line)
        elif "began" in line:
            began.append(line["began"])
        else:
            self._finish(line["item"], line["record"])

    def _finish(self, name: str, record: Mapping[str, Any]) -> None:
        item = self.waiting.pop(0)
        if item.name != name:
            raise RunError(f"got the result of {name}; expected that of {item.name}")
        about = {
            "name": item.name,
            "case": asdict(item.case),
            "keys": item.case.keys,
            "candidate": item.candidate,
            "ours": item.candidate in OURS,
            "direction": item.direction,
        }
        self._take({"record": {**about, **record}})


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
