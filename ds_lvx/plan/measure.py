"""One rank of a calibration: what this machine computes, and what its links carry.

All ranks measure the same thing at the same time, because they will work at the same time: on a
machine with fewer cores than ranks that makes a difference. So each sample begins at a barrier,
which the timers of PyTorch and Triton know nothing of.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from ds_lvx.attention import lvx
from ds_lvx.attention.call import Call
from ds_lvx.attention.common import delta_of
from ds_lvx.attention.layout import Layout
from ds_lvx.compare.decoding import own_steps
from ds_lvx.compare.harness import meet, now, own_device
from ds_lvx.distributed.bundles import Bundle, Spec
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.pending import Pending
from ds_lvx.kernels.choice import kernel_for
from ds_lvx.kernels.interface import Kernel, Problem, Upstream
from ds_lvx.plan.profile import device_name

_SLOW_S = 0.25
"""A transfer or matrix product that takes longer is the largest that is measured."""
_OPERATIONS = 100
_FROM_MEMORY_BYTES = 2**28
"""More than what caches hold."""
_MATRICES = 256
_TOKENS = 4  # for each repeat

Run: TypeAlias = Callable[[], object]


@dataclass(frozen=True)
class Samples:
    """What is measured; the defaults serve a rank on a CPU."""

    lengths: tuple[tuple[int, int], ...]  # seqlen_q and seqlen_kv of the attention kernels
    message_bytes: tuple[int, ...]  # of the transfers, ascending
    heads: int = 8  # of the attention kernels
    kv_heads: int = 8
    head_dim: int = 64
    # Bytes of a shift, and seqlen_q and seqlen_kv of the kernel above it.
    hidden: tuple[int, int, int] = (2**14, 16, 4096)
    elements: int = 2**22  # of elementwise operations, and the square of a matrix product's side
    repeats: int = 7  # of each
    dtype: str = "bfloat16"  # of attention, products and weights
    backward: bool = True  # of attention; without, a profile serves for generation alone
    width: int = 2048  # of the matrices that a row goes through, at most


def measure(wanted: Samples) -> dict[str, Any]:
    """Every sample of this rank, in seconds.

    ``kernels`` are by kind, lists of shape and samples; ``whole_alone`` and ``backward_alone`` are
    for rank 0 while the others wait. ``transfers`` are lists of bytes and samples, ``hidden`` those
    under a kernel.

    Collectives: those that are measured, and agreements of 2 KiB on the CPU.
    """
    device = own_device()
    bench = _Bench(Channel.world(), device, wanted)
    several = bench.world.size > 1
    return {
        "device": device_name(device),
        "kernels": _kernels(bench),
        **_operations(bench),
        "transfers": _transfers(bench) if several else {},
        "hidden": [_hidden(bench)] if several else [],
    }


@dataclass(frozen=True)
class _Bench:
    """Times things that all ranks begin together."""

    world: Channel
    device: torch.device
    wanted: Samples

    def samples(self, run: Run, *, part: bool = True) -> dict[str, list[float]]:
        """Seconds of each repeat on this rank, after one that is not counted; of both clocks.

        What is slow is repeated twice only: else a slow machine would take a quarter of an hour.
        ``processor_seconds`` are those of all threads of this rank. A rank without ``part`` waits
        while others run.
        """

        def once() -> tuple[float, float]:
            begun = meet(self.world), time.process_time()
            if part:
                run()
            return now() - begun[0], time.process_time() - begun[1]

        repeats = min(2, self.wanted.repeats) if self.long([once()[0]]) else self.wanted.repeats
        wall, processor = zip(*(once() for _ in range(repeats)), strict=True)
        meet(self.world)  # what comes next would disturb the last one of who is slower
        return {"seconds": list(wall), "processor_seconds": list(processor)}

    def seconds(self, run: Run, *, part: bool = True) -> list[float]:
        """`samples` of the wall's clock alone."""
        return self.samples(run, part=part)["seconds"]

    def long(self, seconds: list[float]) -> bool:
        """Whether the fastest of these is slow on any rank; the answer is the same on all."""
        return max(each["s"] for each in self.world.agree({"s": min(seconds)})) > _SLOW_S

    def random(self, *shape: int) -> Tensor:
        """Of the dtype that is wanted."""
        return torch.randn(shape, device=self.device, dtype=getattr(torch, self.wanted.dtype))

    def message(self, nbytes: int) -> Tensor:
        """Something to send."""
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)


# --------------------------------------------------------------------------------------------
# What a device computes


def _kernels(bench: _Bench) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for seqlen_q, seqlen_kv in bench.wanted.lengths:
        shape = {"seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv}
        runs = _kernel_runs(bench, **shape)
        seconds = {kind: bench.seconds(run) for kind, run in runs.items()}
        alone = ("whole", "backward") if bench.wanted.backward else ()
        for kind in alone:  # what a rank gains where its neighbours are idle
            seconds[f"{kind}_alone"] = bench.seconds(runs[kind], part=bench.world.rank == 0)
        for kind, each in seconds.items():
            found.setdefault(kind, []).append({**shape, "seconds": each})
    return found


def _kernel_runs(bench: _Bench, seqlen_q: int, seqlen_kv: int) -> dict[str, Run]:
    wanted = bench.wanted
    q, dout = (bench.random(1, seqlen_q, wanted.heads, wanted.head_dim) for _ in range(2))
    k, v = (bench.random(1, seqlen_kv, wanted.kv_heads, wanted.head_dim) for _ in range(2))
    kernel: Kernel = kernel_for("auto", q)
    whole = Problem(q, k, v, softmax_scale=wanted.head_dim**-0.5)
    # One query is a token of a generation: other layers went through the caches since the last.
    copies = range(_copies(k.nbytes + v.nbytes, most=1 + wanted.repeats) if seqlen_q == 1 else 1)
    others = [replace(whole, k=k.clone(), v=v.clone()) for _ in copies]
    wholes, parts = cycle(others), cycle([each.as_part() for each in others])
    runs: dict[str, Run] = {
        "whole": lambda: kernel.forward(next(wholes)),
        "partial": lambda: kernel.forward(next(parts)),
    }
    if wanted.backward:
        out, lse = kernel.forward(whole)
        upstream = Upstream(dout, lse, delta_of(out.to(q.dtype), dout, None, lse))
        runs["backward"] = lambda: kernel.backward(whole, upstream)
    return runs


def _operations(bench: _Bench) -> dict[str, Any]:
    """Elementwise operations, small ones, products, an operator's call, a model's own step."""
    elements = bench.wanted.elements
    wide, narrow = torch.zeros(elements, device=bench.device), bench.random(elements)
    small = torch.zeros(16, device=bench.device)
    side = min(int(elements**0.5), bench.wanted.width)
    row, matrix = bench.random(1, side), bench.random(side, side)
    weights = [matrix.clone() for _ in range(_copies(matrix.nbytes, most=_MATRICES))]

    def small_ones() -> None:
        for _ in range(_OPERATIONS):
            small.add_(1.0)

    return {
        "elementwise": {
            "numbers": elements,
            "bytes_per_number": 8 + narrow.itemsize,  # fp32 read and written, the other read
            "seconds": bench.seconds(lambda: wide.add_(narrow)),
        },
        "operation": {"operations": _OPERATIONS, "seconds": bench.seconds(small_ones)},
        "matmul": _products(bench),
        "weights": {
            "bytes": sum(each.nbytes for each in weights),
            "seconds": bench.seconds(lambda: [functional.linear(row, each) for each in weights]),
        },
        "new": {
            "numbers": elements,
            "bytes_written": wide.itemsize,
            "seconds": bench.seconds(lambda: wide + narrow),
        },
        "call": {"seconds": bench.seconds(_call(bench))},
        "steps": own_steps(dtype=bench.wanted.dtype, tokens=_TOKENS * bench.wanted.repeats),
    }


def _products(bench: _Bench) -> list[dict[str, Any]]:
    """Matrix products of square matrices, each twice as wide as the one before.

    On a CPU without AVX-512 PyTorch has no kernel for bf16, and the widest would take a minute.
    """
    found: list[dict[str, Any]] = []
    widest = int(bench.wanted.elements**0.5)
    side = min(256, widest)
    while side <= widest and not (found and bench.long(found[-1]["seconds"])):
        a, b = bench.random(side, side), bench.random(side, side)
        found.append({"side": side, "seconds": bench.seconds(partial(torch.matmul, a, b))})
        side *= 2
    return found


def _copies(nbytes: int, *, most: int) -> int:
    """Of something that is to be read from memory, not from a cache."""
    return min(max(_FROM_MEMORY_BYTES // nbytes, 1), most)


def _call(bench: _Bench) -> Run:
    """Forward and backward of an operator on next to nothing, alone."""
    wanted = bench.wanted
    q, k, v = (
        bench.random(1, 1, heads, wanted.head_dim).requires_grad_()
        for heads in (wanted.heads, wanted.kv_heads, wanted.kv_heads)
    )
    layout = Layout(Channel(None), (1,), (1,), device=q.device)
    call = Call(layout, kernel_for("auto", q), softmax_scale=1.0, requires_grad=True)
    dout = torch.ones_like(q)
    return lambda: lvx.attend(call, q, k, v)[0].backward(dout)


# --------------------------------------------------------------------------------------------
# What a link carries


def _transfers(bench: _Bench) -> dict[str, list[dict[str, Any]]]:
    """Seconds of a transfer of so many bytes a rank (or a peer), by kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    for kind in ("shift", "gather", "exchange", "shifts"):
        for nbytes in bench.wanted.message_bytes:
            both = bench.samples(_transfer(kind, bench.world, bench.message(nbytes)))
            found.setdefault(kind, []).append({"bytes": nbytes, **both})
            if bench.long(both["seconds"]):
                break
    return found


def _transfer(kind: str, world: Channel, message: Tensor) -> Run:
    spec, n = Spec.of(message), world.size
    if kind == "shift":
        return lambda: world.shift([message], [spec]).wait()
    if kind == "gather":
        return lambda: world.gather_rows([message], [0], [len(message)] * n).wait()
    if kind == "exchange":
        messages = message.repeat(n, 1)
        return lambda: world.exchange_rows([messages], [0], [1] * n).wait()
    other = message.clone()

    def rotate() -> None:
        """A ring's backward: at every step one message moves on, one goes home."""
        returning: Pending[Bundle] | None = None
        for step in range(n):
            following = world.shift([message], [spec]) if step < n - 1 else None
            if returning is not None:
                returning.wait()
            if step:
                returning = world.shift([other], [spec], hops=-step)
            if following is not None:
                following.wait()
        if returning is not None:
            returning.wait()

    return rotate


def _hidden(bench: _Bench) -> dict[str, Any]:
    """A kernel alone, two shifts alone, and both at the same time."""
    nbytes, seqlen_q, seqlen_kv = bench.wanted.hidden
    kernel = _kernel_runs(bench, seqlen_q, seqlen_kv)["partial"]
    message = bench.message(nbytes)

    def shifts(under: Run = lambda: None) -> None:
        sides = [bench.world.shift([message], [Spec.of(message)], hops=hops) for hops in (1, -1)]
        under()
        for side in sides:
            side.wait()

    return {
        "bytes": nbytes,
        "kernel": bench.seconds(kernel),
        "shifts": bench.seconds(shifts),
        "both": bench.seconds(lambda: shifts(kernel)),
    }
