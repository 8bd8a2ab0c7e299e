"""One rank of a calibration: what this machine computes, and what its links carry.

    python -m ds_lvx.plan.measure REQUEST.json

Started by `ds_lvx.plan.calibrate`. All ranks measure the same thing at the same time, because they
will work at the same time: on a machine with fewer cores than ranks that makes a difference.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

import ds_lvx
from ds_lvx.attention import lvx
from ds_lvx.attention.call import Call
from ds_lvx.compare.fresh import answer, bind
from ds_lvx.distributed.bundles import Bundle, Spec
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.pending import Pending
from ds_lvx.distributed.start import init_distributed
from ds_lvx.kernels import Kernel, choose
from ds_lvx.plan.profile import device_name

_SLOW_S = 0.25
"""A transfer that takes longer is the largest that is measured."""


@dataclass(frozen=True)
class Request:
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
    hidden: tuple[tuple[int, int, int], ...]
    elements: int
    repeats: int

    @classmethod
    def of(cls, record: dict[str, Any]) -> Request:
        """From JSON."""
        lengths = tuple((pair[0], pair[1]) for pair in record["lengths"])
        return cls(
            **{**record, "lengths": lengths, "message_bytes": tuple(record["message_bytes"])}
        )


def main() -> None:
    """Run the request, write this rank's answer."""
    answer(lambda record: alone(Request.of(record)))


def alone(request: Request) -> dict[str, Any]:
    """`measure` between the start and the end of ``torch.distributed``."""
    if get_accelerator().device_name() == "cpu":
        bind(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    init_distributed(verbose=False)
    try:
        return measure(request)
    finally:
        ds_lvx.shutdown()


def measure(request: Request) -> dict[str, Any]:
    """Every sample of this rank, in seconds; every rank of the world calls it.

    Returns:
        ``device``; ``kernels`` (by kind, a list of shape and samples; ``whole_alone`` and
        ``backward_alone`` are for rank 0 while the others wait), ``elementwise``, ``operation``,
        ``matmul``, ``call``, ``transfers`` (by kind, a list of bytes and samples), and ``hidden``
        (transfers under a kernel).

    Collectives: those that are measured, and agreements of 2 KiB on the CPU.
    """
    device = _device()
    bench = _Bench(Channel.world(), device, request.repeats)
    return {
        "device": device_name(device),
        "kernels": _kernels(bench, request),
        **_pieces(bench, request),
        "transfers": _transfers(bench, request) if bench.world.size > 1 else {},
        "hidden": _hidden(bench, request) if bench.world.size > 1 else [],
    }


@dataclass(frozen=True)
class _Bench:
    """Times things that all ranks begin together."""

    world: Channel
    device: torch.device
    repeats: int

    def samples(self, run: Callable[[], object], *, part: bool = True) -> list[float]:
        """Seconds of each repeat on this rank, after one that is not counted."""
        return self.both_clocks(run, part=part)["seconds"]

    def both_clocks(
        self, run: Callable[[], object], *, part: bool = True
    ) -> dict[str, list[float]]:
        """`samples`, and the processor's seconds for all threads of this rank."""
        seconds, processor = [], []
        for repeat in range(self.repeats + 1):
            get_accelerator().synchronize()
            self.world.barrier()
            start, started = time.perf_counter(), time.process_time()
            if part:
                run()
            get_accelerator().synchronize()
            if repeat:
                seconds.append(time.perf_counter() - start)
                processor.append(time.process_time() - started)
        return {"seconds": seconds, "processor_seconds": processor}

    def random(self, *shape: int) -> Tensor:
        """bf16."""
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)


def _kernels(bench: _Bench, request: Request) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for seqlen_q, seqlen_kv in request.lengths:
        runs = _kernel_runs(bench, request, seqlen_q, seqlen_kv)
        shape = {"seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv}
        for kind, run in runs.items():
            found.setdefault(kind, []).append({**shape, "seconds": bench.samples(run)})
        for kind in ("whole", "backward"):  # what a rank gains where its neighbours are idle
            mine = bench.samples(runs[kind], part=bench.world.rank == 0)
            found.setdefault(f"{kind}_alone", []).append({**shape, "seconds": mine})
    return found


def _kernel_runs(
    bench: _Bench, request: Request, seqlen_q: int, seqlen_kv: int
) -> dict[str, Callable[[], object]]:
    q, dout = (bench.random(1, seqlen_q, request.heads, request.head_dim) for _ in range(2))
    k, v = (bench.random(1, seqlen_kv, request.kv_heads, request.head_dim) for _ in range(2))
    kernel: Kernel = choose("auto", q)
    scale = request.head_dim**-0.5
    out, lse = kernel.forward(q, k, v, visibility=None, softmax_scale=scale)
    delta = (dout.float() * out.float()).sum(dim=-1).transpose(1, 2).contiguous()

    def forward(*, partial: bool) -> object:
        return kernel.forward(q, k, v, visibility=None, softmax_scale=scale, partial=partial)

    def backward() -> object:
        return kernel.backward(
            q, k, v, dout, lse, delta, visibility=None, softmax_scale=scale, has_dlse=False
        )

    return {
        "whole": lambda: forward(partial=False),
        "partial": lambda: forward(partial=True),
        "backward": backward,
    }


_OPERATIONS = 100


def _pieces(bench: _Bench, request: Request) -> dict[str, Any]:
    """Elementwise operations, small ones, a matrix product, and the call of an operator."""
    wide = torch.zeros(request.elements, device=bench.device)
    narrow = bench.random(request.elements)
    small = torch.zeros(16, device=bench.device)
    side = int(request.elements**0.5)
    a, b = bench.random(side, side), bench.random(side, side)

    def small_ones() -> None:
        for _ in range(_OPERATIONS):
            small.add_(1.0)

    return {
        "elementwise": {
            "numbers": request.elements,
            "bytes_per_number": 10,  # fp32 read and written, bf16 read
            "seconds": bench.samples(lambda: wide.add_(narrow)),
        },
        "operation": {"operations": _OPERATIONS, "seconds": bench.samples(small_ones)},
        "matmul": {"side": side, "seconds": bench.samples(lambda: a @ b)},
        "call": {"seconds": bench.samples(_call(bench, request))},
    }


def _call(bench: _Bench, request: Request) -> Callable[[], object]:
    """Forward and backward of an operator on next to nothing, alone."""
    q, k, v = (
        bench.random(1, 1, heads, request.head_dim).requires_grad_()
        for heads in (request.heads, request.kv_heads, request.kv_heads)
    )
    call = Call(
        channel=Channel(None),
        q_lengths=(1,),
        kv_lengths=(1,),
        kernel=choose("auto", q),
        softmax_scale=1.0,
        requires_grad=True,
    )
    dout = torch.ones_like(q)

    def run() -> None:
        lvx.attend(call, q, k, v, None)[0].backward(dout)

    return run


def _transfers(bench: _Bench, request: Request) -> dict[str, list[dict[str, Any]]]:
    """Seconds of a transfer of so many bytes a rank (or a peer), by kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    kinds = {"shift": _shift, "gather": _gather, "exchange": _exchange, "shifts": _rotation}
    for kind, make in kinds.items():
        for nbytes in request.message_bytes:
            both = bench.both_clocks(make(bench, nbytes))
            found.setdefault(kind, []).append({"bytes": nbytes, **both})
            fastest = min(both["seconds"])
            slowest = max(each["s"] for each in bench.world.agree({"s": fastest}))
            if slowest > _SLOW_S:
                break
    return found


def _hidden(bench: _Bench, request: Request) -> list[dict[str, Any]]:
    """Kernels alone, two shifts alone, and both at the same time."""
    found = []
    for nbytes, seqlen_q, seqlen_kv in request.hidden:
        kernel = _kernel_runs(bench, request, seqlen_q, seqlen_kv)["partial"]
        shifts = _shifts(bench, nbytes)
        found.append(
            {
                "bytes": nbytes,
                "kernel": bench.samples(kernel),
                "shifts": bench.samples(shifts),
                "both": bench.samples(_shifts(bench, nbytes, under=kernel)),
            }
        )
    return found


def _message(bench: _Bench, nbytes: int) -> tuple[Tensor, Spec]:
    message = torch.zeros(nbytes, dtype=torch.uint8, device=bench.device)
    return message, Spec.of(message)


def _shift(bench: _Bench, nbytes: int) -> Callable[[], object]:
    message, spec = _message(bench, nbytes)
    return lambda: bench.world.shift([message], [spec]).wait()


def _shifts(
    bench: _Bench, nbytes: int, *, under: Callable[[], object] | None = None
) -> Callable[[], object]:
    """Two shifts at once, to both sides, perhaps under something else."""
    message, spec = _message(bench, nbytes)
    other = message.clone()

    def run() -> None:
        ahead = bench.world.shift([message], [spec])
        back = bench.world.shift([other], [spec], hops=-1)
        if under is not None:
            under()
        ahead.wait()
        back.wait()

    return run


def _rotation(bench: _Bench, nbytes: int) -> Callable[[], object]:
    """The transfers of a ring's backward: at every step one message moves on, one goes home."""
    message, spec = _message(bench, nbytes)
    other = message.clone()

    def run() -> None:
        bench.world.shift([message], [spec]).wait()
        returning: Pending[Bundle] | None = None
        for step in range(1, bench.world.size):
            last = step == bench.world.size - 1
            following = None if last else bench.world.shift([message], [spec])
            if returning is not None:
                returning.wait()
            returning = bench.world.shift([other], [spec], hops=-step)
            if following is not None:
                following.wait()
        if returning is not None:
            returning.wait()

    return run


def _gather(bench: _Bench, nbytes: int) -> Callable[[], object]:
    message, spec = _message(bench, nbytes)
    return lambda: bench.world.gather([message], [[spec]] * bench.world.size).wait()


def _exchange(bench: _Bench, nbytes: int) -> Callable[[], object]:
    n = bench.world.size
    messages = torch.zeros(n, nbytes, dtype=torch.uint8, device=bench.device)
    return lambda: bench.world.exchange_rows([messages], [0], [1] * n).wait()


def _device() -> torch.device:
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(accelerator.current_device_name())


if __name__ == "__main__":
    main()
