"""The ``auto`` kernel: for each kind of request the fastest of those that can do it, as measured.

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
from ds_lvx.kernels.interface import Kernel
from ds_lvx.kernels.visibility import Visibility

TRUSTED = "native"
"""Always a candidate, and what the others are checked against."""

_RUNS = 3
_TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 1e-2, torch.float32: 1e-3}
_PACKAGES = ("ds_lvx", "torch", "triton")

Clock: TypeAlias = Callable[[Callable[[], Any]], float]


class Table:
    """Which kernel was fastest, by kind of request, on one device.

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


class AutoKernel:
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

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        visibility: Visibility | None,
        softmax_scale: float,
        partial: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See `ds_lvx.kernels.Kernel.forward`."""
        options: dict[str, Any] = {
            "visibility": visibility,
            "softmax_scale": softmax_scale,
            "partial": partial,
        }
        return self._fastest("forward", (q, k, v), options).forward(q, k, v, **options)

    def fold(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        running: tuple[Tensor, Tensor],
        *,
        visibility: Visibility | None,
        softmax_scale: float,
    ) -> None:
        """See `ds_lvx.kernels.Kernel.fold`; by the kernel that is fastest in forward."""
        options: dict[str, Any] = {"visibility": visibility, "softmax_scale": softmax_scale}
        kernel = self._fastest("forward", (q, k, v), {**options, "partial": True})
        kernel.fold(q, k, v, running, **options)

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dout: Tensor,
        lse: Tensor,
        delta: Tensor,
        *,
        visibility: Visibility | None,
        softmax_scale: float,
        has_dlse: bool,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ds_lvx.kernels.Kernel.backward`."""
        options: dict[str, Any] = {
            "visibility": visibility,
            "softmax_scale": softmax_scale,
            "has_dlse": has_dlse,
        }
        tensors = (q, k, v, dout, lse, delta)
        fastest = self._fastest("backward", tensors, options)
        return fastest.backward(*tensors, **options, into=into)

    def _fastest(
        self, direction: str, tensors: tuple[Tensor, ...], options: Mapping[str, Any]
    ) -> Kernel:
        trusted = self._candidates[TRUSTED]
        q, k = tensors[:2]
        if len(self._candidates) == 1 or q.numel() == 0 or k.numel() == 0:
            return trusted
        kind = kind_of(direction, q, k, options)
        entry = self._table.entries().get(kind)
        if entry is None:
            if q.is_cuda and torch.cuda.is_current_stream_capturing():
                return trusted  # a graph under capture must not wait for the host
            entry = self._measure(direction, tensors, options)
            if entry is None:
                return trusted
            self._table.add(kind, entry)
            entry = self._table.entries()[kind]
        return self._candidates.get(entry["chosen"], trusted)

    def _measure(
        self, direction: str, tensors: tuple[Tensor, ...], options: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """An entry of the table; None when nothing can be said by these tensors."""
        expected = getattr(self._candidates[TRUSTED], direction)(*tensors, **options)
        if not bool(expected[0].isfinite().all()):
            return None
        seconds: dict[str, float] = {}
        excluded: dict[str, str] = {}
        for name, kernel in self._candidates.items():
            run = functools.partial(getattr(kernel, direction), *tensors, **options)
            try:
                error = 0.0 if name == TRUSTED else _difference(run(), expected)
                if error > _TOLERANCE[tensors[0].dtype]:
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


def kind_of(direction: str, q: Tensor, k: Tensor, options: Mapping[str, Any]) -> str:
    """The row of the table for a request; lengths count by powers of two."""
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_kv, kv_heads = k.shape[1:3]
    parts = [
        direction,
        str(q.dtype).removeprefix("torch."),
        f"head_dim {head_dim}",
        f"{heads // kv_heads} query heads a kv head",
        f"{_power(batch * kv_heads)} kv heads in all",
        f"{_power(seqlen_q)} queries",
        f"{_power(seqlen_kv)} keys",
    ]
    if options["visibility"] is not None:
        parts.append("visibility")
    if options.get("has_dlse"):
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
