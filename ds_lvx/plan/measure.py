"""One rank of a calibration: what this machine computes, and what its links carry.

All ranks measure the same thing at the same time, because they will work at the same time: on a
machine with fewer cores than ranks that makes a difference. So each sample begins at a barrier,
which the timers of PyTorch and Triton know nothing of.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

import ds_lvx
from ds_lvx.attention import lvx
from ds_lvx.attention.call import Call
from ds_lvx.attention.common import delta_of
from ds_lvx.attention.layout import Layout
from ds_lvx.compare.fresh import bind
from ds_lvx.distributed.bundles import Bundle, Spec
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.pending import Pending
from ds_lvx.distributed.start import init_distributed
from ds_lvx.kernels.choice import kernel_for
from ds_lvx.kernels.interface import Kernel, Problem, Upstream
from ds_lvx.plan.profile import device_name

_SLOW_S = 0.25
"""A transfer that takes longer is the largest that is measured."""
_OPERATIONS = 100

Run: TypeAlias = Callable[[], object]


@dataclass(frozen=True)
class Samples:
    """What is measured.

    Attributes:
        heads, kv_heads, head_dim: of the attention kernels.
        lengths: pairs of seqlen_q and seqlen_kv.
        message_bytes: of the transfers, ascending.
        hidden: bytes of a shift, and seqlen_q and seqlen_kv of the kernel above it.
        elements: of elementwise operations, and the square of a matrix product's side.
        repeats: of each.
    """

    heads: int
    kv_heads: int
    head_dim: int
    lengths: tuple[tuple[int, int], ...]
    message_bytes: tuple[int, ...]
    hidden: tuple[int, int, int]
    elements: int
    repeats: int


def alone(wanted: Samples) -> dict[str, Any]:
    """`measure` between the start and the end of ``torch.distributed``."""
    accelerator, device = get_accelerator(), torch.device("cpu")
    if accelerator.device_name() == "cpu":
        bind(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    else:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.device(accelerator.current_device_name())
    init_distributed(verbose=False)
    try:
        return measure(_Bench(Channel.world(), device, wanted))
    finally:
        ds_lvx.shutdown()


def measure(bench: _Bench) -> dict[str, Any]:
    """Every sample of this rank, in seconds; every rank of the world calls it.

    Returns:
        ``device``; ``kernels`` (by kind, a list of shape and samples; ``whole_alone`` and
        ``backward_alone`` are for rank 0 while the others wait), ``elementwise``, ``operation``,
        ``matmul``, ``call``, ``transfers`` (by kind, a list of bytes and samples), and ``hidden``
        (transfers under a kernel).

    Collectives: those that are measured, and agreements of 2 KiB on the CPU.
    """
    found = {"device": device_name(bench.device), "kernels": _kernels(bench), **_operations(bench)}
    if bench.world.size == 1:
        return {**found, "transfers": {}, "hidden": []}
    return {**found, "transfers": _transfers(bench), "hidden": [_hidden(bench)]}


@dataclass(frozen=True)
class _Bench:
    """Times things that all ranks begin together."""

    world: Channel
    device: torch.device
    wanted: Samples

    def samples(self, run: Run, *, part: bool = True) -> dict[str, list[float]]:
        """Seconds of each repeat on this rank, after one that is not counted; of both clocks.

        ``processor_seconds`` are those of all threads of this rank.

        Args:
            run: what is timed.
            part: False for a rank that waits while others run.
        """
        found: dict[str, list[float]] = {"seconds": [], "processor_seconds": []}
        for repeat in range(self.wanted.repeats + 1):
            get_accelerator().synchronize()
            self.world.barrier()
            begun = time.perf_counter(), time.process_time()
            if part:
                run()
            get_accelerator().synchronize()
            if repeat:
                found["seconds"].append(time.perf_counter() - begun[0])
                found["processor_seconds"].append(time.process_time() - begun[1])
        return found

    def seconds(self, run: Run, *, part: bool = True) -> list[float]:
        """`samples` of the wall's clock alone."""
        return self.samples(run, part=part)["seconds"]

    def random(self, *shape: int) -> Tensor:
        """bf16."""
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    def message(self, nbytes: int) -> Tensor:
        """Something to send."""
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)


# --------------------------------------------------------------------------------------------
# What a device computes


def _kernels(bench: _Bench) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for seqlen_q, seqlen_kv in bench.wanted.lengths:
        runs = _kernel_runs(bench, seqlen_q, seqlen_kv)
        seconds = {kind: bench.seconds(run) for kind, run in runs.items()}
        for kind in ("whole", "backward"):  # what a rank gains where its neighbours are idle
            mine = bench.seconds(runs[kind], part=bench.world.rank == 0)
            seconds[f"{kind}_alone"] = mine
        for kind, each in seconds.items():
            shape = {"seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv}
            found.setdefault(kind, []).append({**shape, "seconds": each})
    return found


def _kernel_runs(bench: _Bench, seqlen_q: int, seqlen_kv: int) -> dict[str, Run]:
    wanted = bench.wanted
    q, dout = (bench.random(1, seqlen_q, wanted.heads, wanted.head_dim) for _ in range(2))
    k, v = (bench.random(1, seqlen_kv, wanted.kv_heads, wanted.head_dim) for _ in range(2))
    kernel: Kernel = kernel_for("auto", q)
    whole = Problem(q, k, v, softmax_scale=wanted.head_dim**-0.5)
    part = whole.as_part()
    out, lse = kernel.forward(whole)
    upstream = Upstream(dout, lse, delta_of(out.to(q.dtype), dout, None, lse))
    return {
        "whole": lambda: kernel.forward(whole),
        "partial": lambda: kernel.forward(part),
        "backward": lambda: kernel.backward(whole, upstream),
    }


def _operations(bench: _Bench) -> dict[str, Any]:
    """Elementwise operations, small ones, a matrix product, and the call of an operator."""
    elements = bench.wanted.elements
    wide, narrow = torch.zeros(elements, device=bench.device), bench.random(elements)
    small = torch.zeros(16, device=bench.device)
    side = int(elements**0.5)
    a, b = bench.random(side, side), bench.random(side, side)

    def small_ones() -> None:
        for _ in range(_OPERATIONS):
            small.add_(1.0)

    return {
        "elementwise": {
            "numbers": elements,
            "bytes_per_number": 10,  # fp32 read and written, bf16 read
            "seconds": bench.seconds(lambda: wide.add_(narrow)),
        },
        "operation": {"operations": _OPERATIONS, "seconds": bench.seconds(small_ones)},
        "matmul": {"side": side, "seconds": bench.seconds(lambda: a @ b)},
        "call": {"seconds": bench.seconds(_call(bench))},
    }


def _call(bench: _Bench) -> Run:
    """Forward and backward of an operator on next to nothing, alone."""
    wanted = bench.wanted
    q, k, v = (
        bench.random(1, 1, heads, wanted.head_dim).requires_grad_()
        for heads in (wanted.heads, wanted.kv_heads, wanted.kv_heads)
    )
    call = Call(
        Layout(Channel(None), (1,), (1,), device=q.device),
        kernel=kernel_for("auto", q),
        softmax_scale=1.0,
        requires_grad=True,
    )
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
            fastest = min(both["seconds"])
            if max(each["s"] for each in bench.world.agree({"s": fastest})) > _SLOW_S:
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
        world.shift([message], [spec]).wait()
        returning: Pending[Bundle] | None = None
        for step in range(1, n):
            following = world.shift([message], [spec]) if step < n - 1 else None
            if returning is not None:
                returning.wait()
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

    def shifts(under: Run | None = None) -> None:
        sides = [bench.world.shift([message], [Spec.of(message)], hops=hops) for hops in (1, -1)]
        if under is not None:
            under()
        for side in sides:
            side.wait()

    return {
        "bytes": nbytes,
        "kernel": bench.seconds(kernel),
        "shifts": bench.seconds(shifts),
        "both": bench.seconds(lambda: shifts(kernel)),
    }
