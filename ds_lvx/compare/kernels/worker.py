"""The process that runs the kernel benchmark's candidates, one after the other.

    python -m ds_lvx.compare.kernels.worker REQUEST.json

Every result goes into a file at once: a candidate may end the process (an illegal address, after
which CUDA does nothing more) or hang, and `ds_lvx.compare.kernels.measure` then starts it again
behind that candidate. Which one it was stands in the file too.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import torch

from ds_lvx.compare.fresh import answer
from ds_lvx.compare.kernels import candidates as kernel_candidates
from ds_lvx.compare.kernels.candidates import Candidate, LeftOut, Ours
from ds_lvx.compare.kernels.cases import KernelCase
from ds_lvx.compare.kernels.check import Exact, exact, right
from ds_lvx.compare.kernels.clock import Clock, clock_of, measured_rates, timed

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Item:
    """One measurement.

    Attributes:
        case: what is computed.
        candidate: who computes it.
        direction: ``"forward"`` or ``"backward"``.
    """

    case: KernelCase
    candidate: str
    direction: str

    @property
    def name(self) -> str:
        """Such as ``mllama-192/triton/forward``."""
        return f"{self.case.name}/{self.candidate}/{self.direction}"

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Item:
        """From JSON."""
        case = KernelCase(**record["case"])
        return cls(case, record["candidate"], record["direction"])


@dataclass(frozen=True)
class Request:
    """What a worker does.

    Attributes:
        items: in order; those of one case together.
        device: ``"cuda"`` or ``"cpu"``.
        repeats: samples of a time, at most.
        seconds: that the samples of one time should take.
        limit_s: a candidate that takes longer hangs: the process ends.
        deadline: of all, as time.time() has it; items that have not begun then are left out.
        rates: measure what the device reaches, too.
        quick: that by small sizes.
        path: of the file that gets a line of JSON for every result.
    """

    items: list[Item]
    device: str
    repeats: int
    seconds: float
    limit_s: float
    deadline: float
    rates: bool
    quick: bool
    path: str

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Request:
        """From JSON."""
        return cls(**{**record, "items": [Item.of(item) for item in record["items"]]})


class Worker:
    """Runs the items of a request.

    Args:
        request: what to do.
        make: makes a candidate; a test may give another.
    """

    def __init__(
        self,
        request: Request,
        make: Callable[[str, Any], Candidate] = kernel_candidates.make,
    ) -> None:
        self._request = request
        self._make = make
        self._device = torch.device(request.device)
        self._clock: Clock = clock_of(self._device)
        self._case: KernelCase | None = None
        self._exact: Exact | Exception | None = None

    def run(self) -> None:
        """All items, and the device's rates first."""
        if self._request.rates:
            rates = measured_rates(self._clock, self._device, quick=self._request.quick)
            self._write({"rates": {**rates, "clock": self._clock.source}})
        for item in self._request.items:
            self._write({"began": item.name})
            faulthandler.dump_traceback_later(self._request.limit_s, exit=True)
            self._write({"item": item.name, "record": self._record(item)})
            faulthandler.cancel_dump_traceback_later()
            if self._device.type == "cuda":
                gc.collect()
                torch.cuda.synchronize()  # raises, and ends this process, if CUDA is broken
                torch.cuda.empty_cache()

    def _record(self, item: Item) -> dict[str, Any]:
        """The result of an item, whatever happens."""
        if time.time() > self._request.deadline:
            return left_out("the time of the whole run was over")
        with catch_warnings(record=True) as said:
            simplefilter("always")
            try:
                return self._measured(item)
            except LeftOut as reason:
                return left_out(str(reason))
            # Anything that a candidate can raise is a result.
            except Exception as error:  # noqa: BLE001
                reasons = [str(each.message) for each in said]
                return failed(f"{type(error).__name__}: {error}", reasons)

    def _measured(self, item: Item) -> dict[str, Any]:
        known = self._known(item.case)
        candidate = self._make(item.candidate, known.inputs)
        run = getattr(candidate, item.direction)
        with candidate.active():
            run()  # compiles, and lets `auto` choose
            before = self._memory_bytes(reset=True)
            found = run()
            peak = self._memory_bytes()
            extra = None if before is None or peak is None else peak - before
            if item.direction == "forward":
                errors = known.errors_of_forward(found)
            else:
                errors = known.errors_of_backward(candidate.by_key_head(found))
            del found
            record = {**candidate.notes, "extra_bytes": extra, "errors": _plain(errors)}
            if isinstance(candidate, Ours):
                record["chosen"] = candidate.chosen(item.direction)
            if not right(errors, DTYPE):
                return {"status": "wrong", "reason": "differs from float64", **record}
            repeats, seconds = self._request.repeats, self._request.seconds
            samples = timed(self._clock, run, repeats=repeats, seconds=seconds)
        return {"status": "ok", **record, **samples.record()}

    def _known(self, case: KernelCase) -> Exact:
        """The case's inputs and what is right; made once, also where that fails."""
        if case != self._case:
            self._exact = None  # frees the last one first
            self._case = case
            try:
                self._exact = exact(case, self._device, DTYPE)
            # Kept for every candidate of the case: none of them can be checked.
            except Exception as error:  # noqa: BLE001
                self._exact = error.with_traceback(None)
        if not isinstance(self._exact, Exact):
            what = f"{type(self._exact).__name__}: {self._exact}"
            raise RuntimeError(f"the inputs could not be made: {what}")
        return self._exact

    def _memory_bytes(self, *, reset: bool = False) -> int | None:
        """The device's memory in use at most since the last reset; None on a CPU."""
        if self._device.type != "cuda":
            return None
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.max_memory_allocated())

    def _write(self, line: Mapping[str, Any]) -> None:
        with Path(self._request.path).open("a") as file:
            file.write(json.dumps(line) + "\n")


def left_out(reason: str) -> dict[str, Any]:
    """The record of an item that was not tried."""
    return {"status": "left out", "reason": reason}


def failed(reason: str, warnings: list[str] | None = None) -> dict[str, Any]:
    """The record of an item that raised, hung or ended the process."""
    said = {} if not warnings else {"warnings": sorted(set(warnings))}
    return {"status": "failed", "reason": reason, **said}


def _plain(errors: Mapping[str, float]) -> dict[str, float | str]:
    """Without the NaN and inf that JSON does not have."""
    return {name: e if math.isfinite(e) else str(e) for name, e in errors.items()}


def main() -> None:
    """Run the request in the file that the command names."""
    answer(lambda record: Worker(Request.of(record)).run())


if __name__ == "__main__":
    main()
