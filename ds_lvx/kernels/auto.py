"""The ``auto`` kernel: for each kind of problem the fastest of those that can do it, as measured.

The first call of a kind runs every candidate on the very tensors of the call, checks it against
the trusted one, and times it; a small table per device keeps the winner, on disk as well, with the
versions in its name. Which one wins depends on the shapes, so that no rule of thumb would do.
"""

from __future__ import annotations

import functools
import hashlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ds_lvx import cache
from ds_lvx.kernels.interface import Kernel, Problem, Upstream

TRUSTED = "native"
"""Always a candidate, and what the others are checked against."""

_RUNS = 3
_TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 1e-2, torch.float32: 1e-3}
_PACKAGES = ("ds_lvx", "torch", "triton")

Clock: TypeAlias = Callable[[Callable[[], Any]], float]


class Table:
    """Which kernel was fastest, by kind of problem, on one device.

    Args:
        name: of the file in the cache folder.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._entries: dict[str, dict[str, Any]] = dict(cache.read(name))

    @property
    def path(self) -> Path:
        """The file; it may not exist yet."""
        return cache.folder() / self.name

    def entries(self) -> Mapping[str, Mapping[str, Any]]:
        """``{kind: {"chosen": name, "seconds": {name: s}, "excluded": {name: reason}}}``."""
        return self._entries

    def add(self, kind: str, entry: dict[str, Any]) -> None:
        """Keep an entry, unless another process was first: then its entry holds here too."""
        self._entries = cache.update(self.name, lambda held: {kind: entry, **held})


class AutoKernel(Kernel):
    """The fastest of some kernels, call by call.

    Args:
        candidates: by name; the trusted one among them.
        table: what was measured so far.
        clock: seconds that a function takes, when everything before it is done.
    """

    name = "auto"

    def __init__(
        self, candidates: Mapping[str, Kernel], table: Table, clock: Clock | None = None
    ) -> None:
        self._candidates = dict(candidates)
        self._table = table
        self._clock = _cuda_seconds if clock is None else clock

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """See `ds_lvx.kernels.interface.Kernel.forward`."""
        return self._fastest(problem).forward(problem)

    def fold(self, problem: Problem, running: tuple[Tensor, Tensor]) -> None:
        """See `ds_lvx.kernels.interface.Kernel.fold`; by the kernel that is fastest in forward."""
        part = problem.as_part()
        self._fastest(part).fold(part, running)

    def backward(
        self,
        problem: Problem,
        upstream: Upstream,
        *,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ds_lvx.kernels.interface.Kernel.backward`."""
        return self._fastest(problem, upstream).backward(problem, upstream, into=into)

    def _fastest(self, problem: Problem, upstream: Upstream | None = None) -> Kernel:
        trusted = self._candidates[TRUSTED]
        if len(self._candidates) == 1 or problem.is_empty:
            return trusted
        kind = kind_of(problem, upstream)
        entry = self._table.entries().get(kind)
        if entry is None:
            if problem.q.is_cuda and torch.cuda.is_current_stream_capturing():
                return trusted  # a graph under capture must not wait for the host
            entry = self._measure(problem, upstream)
            if entry is None:
                return trusted
            self._table.add(kind, entry)
            entry = self._table.entries()[kind]
        return self._candidates.get(entry["chosen"], trusted)

    def _measure(self, problem: Problem, upstream: Upstream | None) -> dict[str, Any] | None:
        """An entry of the table; None when nothing can be said by these tensors."""
        expected = _run(self._candidates[TRUSTED], problem, upstream)
        if not bool(expected[0].isfinite().all()):
            return None
        seconds: dict[str, float] = {}
        excluded: dict[str, str] = {}
        for name, kernel in self._candidates.items():
            run = functools.partial(_run, kernel, problem, upstream)
            try:
                error = 0.0 if name == TRUSTED else _difference(run(), expected)
                if error > _TOLERANCE[problem.q.dtype]:
                    excluded[name] = f"differs from {TRUSTED} by {error:.1e} of the largest value"
                    continue
                seconds[name] = statistics.median(self._clock(run) for _ in range(_RUNS))
            except torch.OutOfMemoryError:
                return None  # another call may find more room
            # Whatever a candidate cannot do, the trusted one can.
            except Exception as error:  # noqa: BLE001
                excluded[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        chosen = min(seconds, key=lambda name: seconds[name])
        return {"chosen": chosen, "seconds": seconds, "excluded": excluded}


def _run(kernel: Kernel, problem: Problem, upstream: Upstream | None) -> tuple[Tensor, ...]:
    if upstream is None:
        return kernel.forward(problem)
    return kernel.backward(problem, upstream)


def kind_of(problem: Problem, upstream: Upstream | None) -> str:
    """The row of the table for a problem; lengths count by powers of two."""
    batch, seqlen_q, heads, head_dim = problem.q.shape
    seqlen_kv, kv_heads = problem.k.shape[1:3]
    parts = [
        "forward" if upstream is None else "backward",
        str(problem.q.dtype).removeprefix("torch."),
        f"head_dim {head_dim}",
        f"{heads // kv_heads} query heads a kv head",
        f"{_power(batch * kv_heads)} kv heads in all",
        f"{_power(seqlen_q)} queries",
        f"{_power(seqlen_kv)} keys",
    ]
    if problem.rule is not None:
        parts.append(f"visibility {problem.rule.structure}")
    if upstream is not None and upstream.has_dlse:
        parts.append("dlse")
    return ", ".join(parts)


def _power(length: int) -> int:
    """The power of two at or above."""
    return 1 << max(length - 1, 0).bit_length()


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest error of any output, relative to its largest value; NaN and inf must agree."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        finite = other.isfinite()
        if not torch.equal(finite, one.isfinite()):
            return float("inf")
        scale = other.where(finite, 0.0).abs().amax().float().clamp_min(1e-30)
        gap = (one.float() - other.float()).where(finite, 0.0).abs().amax()
        worst = max(worst, float(gap / scale))
    return worst


def _cuda_seconds(run: Callable[[], Any]) -> float:
    """Seconds on the device, by its own events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def table_of(device: torch.device) -> Table:
    """The table of a CUDA device, under these versions."""
    name = torch.cuda.get_device_name(device)
    versions = [*map(_version, _PACKAGES), torch.version.cuda, torch.backends.cudnn.version()]
    key = hashlib.sha256(repr([name, versions]).encode()).hexdigest()[:12]
    slug = "-".join(name.lower().split())
    return Table(f"kernels-{slug}-{key}.json")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
