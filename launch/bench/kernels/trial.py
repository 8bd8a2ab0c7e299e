"""One trial of the kernel benchmark: a candidate on a case, checked and timed in this process."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from torch.utils.benchmark import Timer

from bench.kernels.candidates import Candidate, LeftOut, make
from bench.kernels.cases import KernelCase
from bench.peak import meter
from ds_lvx.compare.harness import spread
from ds_lvx.compare.kernels import LEAST_SAMPLES, Exact, exact, is_right, samples_s

SOURCES = {
    "cuda": "CUDA events, L2 flushed before each run (triton.testing.do_bench)",
    "cpu": "torch.utils.benchmark",
}


@dataclass(frozen=True)
class Trial:
    """One measurement: what is computed, by whom, and ``"forward"`` or ``"backward"``."""

    case: KernelCase
    candidate: str
    direction: str

    @property
    def name(self) -> str:
        """Such as ``mllama-192/triton/forward``."""
        return f"{self.case.name}/{self.candidate}/{self.direction}"


@dataclass(frozen=True)
class Timing:
    """How trials are timed."""

    device: str  # ``"cuda"`` or ``"cpu"``
    repeats: int = 50  # samples of a time, at most
    seconds: float = 0.5  # that the samples of one time should take
    budget_s: float = 3600.0  # of the whole run; what has not begun then is left out
    quick: bool = False  # small sizes for the device's rates
    start: str = "spawn"  # of a process: ``"fork"`` is quick, and breaks CUDA and OpenMP


class Bench:
    """Measures trials in this process; keeps the inputs of the last case."""

    def __init__(self, timing: Timing, make: Callable[..., Candidate] = make) -> None:
        self._timing = timing
        self._make = make
        self._device = torch.device(timing.device)
        self._case: KernelCase | None = None
        self._exact: Exact | str = ""

    def record(self, trial: Trial) -> dict[str, Any]:
        """The result of a trial, whatever happens."""
        with catch_warnings(record=True) as said:
            simplefilter("always")
            try:
                return self._measured(trial)
            except LeftOut as decision:
                return {"status": "left out", "reason": str(decision)}
            # Anything that a candidate can raise is a result.
            except Exception as error:  # noqa: BLE001
                warnings = sorted({str(each.message) for each in said})
                return {"status": "failed", "reason": _told(error), "warnings": warnings}

    def tidy(self) -> None:
        """Free what the last trial left; raises if CUDA is broken."""
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _measured(self, trial: Trial) -> dict[str, Any]:
        known = self._known(trial.case)
        candidate = self._make(trial.candidate, known.problem, known.upstream)
        run = getattr(candidate, trial.direction)
        with candidate.active():
            run()  # compiles, and lets `auto` choose
            found, extra = self._extra_bytes(run)
            if trial.direction == "backward":
                found = candidate.by_key_head(found)
            errors = known.errors(trial.direction, found)
            del found
            # JSON has neither NaN nor inf.
            told = {name: e if math.isfinite(e) else str(e) for name, e in errors.items()}
            record = {**candidate.notes, "extra_bytes": extra, "errors": told}
            if candidate.chosen is not None:
                record["chosen"] = candidate.chosen(trial.direction)
            if not is_right(errors):
                return {"status": "wrong", "reason": "differs from float64", **record}
            timing = self._timing
            taken = samples_s(run, self._device, repeats=timing.repeats, seconds=timing.seconds)
            host = host_s(run, self._device) or taken
        return {"status": "ok", **record, "device_s": spread(taken), "host_s": spread(host)}

    def _known(self, case: KernelCase) -> Exact:
        """The case's tensors and what is right; made once, also where that fails."""
        if case != self._case:
            self._case, self._exact = case, ""  # frees the last one first
            try:
                self._exact = exact(case.draw(self._device))
            # Kept for every candidate of the case: none of them can be checked.
            except Exception as error:  # noqa: BLE001
                self._exact = _told(error)
        if isinstance(self._exact, str):
            raise RuntimeError(f"the inputs could not be made: {self._exact}")
        return self._exact

    def _extra_bytes(self, run: Callable[[], Any]) -> tuple[Any, int | None]:
        """What it returns, and the device's memory that it needs; None on a CPU."""
        if self._device.type != "cuda":
            return run(), None
        memory = meter("cuda")
        memory.reset()
        before = memory.now_bytes()
        found = run()
        return found, memory.peak_bytes() - before

    def rates(self) -> dict[str, Any]:
        """What the device reaches: a bf16 product of square matrices, and a copy of its memory."""
        size, copied = (256, 2**22) if self._timing.quick else (8192, 2**31)
        a, b = (torch.randn(size, size, device=self._device).bfloat16() for _ in range(2))
        product = torch.empty_like(a)
        source = torch.ones(copied, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        products, copies = (
            spread(samples_s(run, self._device, repeats=20, seconds=2.0))
            for run in (partial(torch.mm, a, b, out=product), partial(target.copy_, source))
        )
        return {
            "matrix_size": size,
            "matrix_s": products,
            "matrix_flops": 2 * size**3 / products["median"],
            "copied_bytes": copied,
            "copy_s": copies,
            "memory_bytes_per_s": 2 * copied / copies["median"],
            "clock": SOURCES[self._timing.device],
        }


def host_s(run: Callable[[], Any], device: torch.device) -> list[float]:
    """Seconds until a function returns while its work is under way; none on a CPU, which waits."""
    if device.type != "cuda":
        return []
    wait, globals_ = "synchronize()", {"run": run, "synchronize": torch.cuda.synchronize}
    timer = Timer("run()", setup=wait, globals=globals_, timer=time.perf_counter)
    return [timer.timeit(1).mean for _ in range(LEAST_SAMPLES)]


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
