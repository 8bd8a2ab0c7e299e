"""One rank of a comparison of operators: the same tensors through every method, in turns.

    python -m ds_lvx.compare.operators.rank REQUEST.json

Started by `ds_lvx.compare.fresh`; `measure` also serves ranks that a launcher has started.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

import ds_lvx
from ds_lvx.attention import lvx, recompute, ring, ulysses
from ds_lvx.attention.call import Call, settle
from ds_lvx.attention.common import LocalAttention
from ds_lvx.compare.fresh import answer
from ds_lvx.compare.network import read_counters
from ds_lvx.compare.operators import agreement
from ds_lvx.compare.operators.inputs import Inputs, Shape, make_inputs
from ds_lvx.compare.operators.kernel_calls import NotingKernel
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.pending import without_overlap
from ds_lvx.distributed.start import init_distributed
from ds_lvx.distributed.traffic import Traffic, traffic
from ds_lvx.kernels import Kernel, choose
from ds_lvx.plan.profile import ranks_of_this_node

METHODS = ("lvx-gather", "lvx-ring", "lvx-auto", "ulysses", "ring", "none")


@dataclass(frozen=True)
class Request:
    """What is measured.

    Attributes:
        shape: of the whole sequence.
        methods: some of `METHODS`; ``none`` is all of it on rank 0, while the others wait.
        recompute: lvx projects K and V again in backward; only with ``shape.features_dim``.
        overlap: transfers run under computation.
        kernel: as in `ds_lvx.lv_xattn`.
        warmup, repeats: rounds, in each of which every method has one step.
    """

    shape: Shape
    methods: Sequence[str]
    recompute: bool = False
    overlap: bool = True
    kernel: str = "auto"
    warmup: int = 2
    repeats: int = 10

    @classmethod
    def of(cls, record: dict[str, Any]) -> Request:
        """From JSON."""
        return cls(**{**record, "shape": Shape(**record["shape"])})


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


def bind(rank: int, ranks: int) -> None:
    """Keep this process, and the threads that it will start, on its share of the cores.

    Where ranks outnumber cores, the scheduler would now and then put one more on a core than on
    another, and every rank waits for the slowest.
    """
    free = sorted(os.sched_getaffinity(0))
    first = rank * len(free) // ranks
    last = max((rank + 1) * len(free) // ranks, first + 1)
    os.sched_setaffinity(0, free[first:last])


@dataclass
class Samples:
    """Seconds of every step of a method on this rank."""

    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)

    def add(self, marks: Sequence[float]) -> None:
        """One step's begin, end of forward, end."""
        self.forward_s.append(marks[1] - marks[0])
        self.backward_s.append(marks[2] - marks[1])


def measure(request: Request) -> dict[str, Any]:
    """Compare results, then time steps. Every rank of the world calls it.

    Returns:
        ``differences``: see `agreement.Difference`. ``methods``, empty where there are
        disagreements: by name, ``step`` and ``kernels`` with the `Samples`, ``traffic`` of one step
        in bytes and calls, and ``interface``, what left the interface in that step, where
        GLOO_SOCKET_IFNAME names it. ``none`` is in rank 0's answer only.

    Collectives: those of the methods, and agreements of 2 KiB on the CPU.
    """
    world, device = Channel.world(), _device()
    found = check(request, world, device)
    records = world.agree({"disagree": bool(agreement.disagreements(found))})
    result: dict[str, Any] = {"rank": world.rank, "differences": [asdict(d) for d in found]}
    if any(record["disagree"] for record in records):
        return {**result, "methods": {}}
    runs = _runs(request, request.shape, world, device)
    steps = {method: Samples() for method in runs}
    kernels = {method: Samples() for method in runs}
    with nullcontext() if request.overlap else without_overlap():
        for turn in range(request.warmup + request.repeats):
            for method, run in runs.items():
                marks = run.step() if run.takes_part else run.wait()
                alone_marks = run.kernels() if run.takes_part else run.wait()
                if turn >= request.warmup:
                    steps[method].add(marks)
                    kernels[method].add(alone_marks)
        counted = {method: run.counted() for method, run in runs.items()}
    result["methods"] = {
        method: {
            "step": asdict(steps[method]),
            "kernels": asdict(kernels[method]),
            "schedule": run.schedule,
            **counted[method],
        }
        for method, run in runs.items()
        if run.takes_part
    }
    return result


def check(request: Request, world: Channel, device: torch.device) -> list[agreement.Difference]:
    """This rank's differences: a small shape against the oracle, the whole shape among methods."""
    small = agreement.small(request.shape)
    found = []
    for name, shape in (("small", small), ("whole", request.shape)):
        results = {
            method: run.results()
            for method, run in _runs(request, shape, world, device).items()
            if method != "none"
        }
        if name == "small":
            ranks, rank = world.size, world.rank
            results[agreement.EXACT] = agreement.exact(shape, ranks=ranks, rank=rank, device=device)
        found += agreement.differences(results, dtype=shape.dtype, rank=world.rank, shape=name)
    return found


def _runs(request: Request, shape: Shape, world: Channel, device: torch.device) -> dict[str, Run]:
    mine = make_inputs(shape, ranks=world.size, shards=[world.rank], device=device)
    whole = mine
    if "none" in request.methods and world.rank == 0:
        whole = make_inputs(shape, ranks=world.size, shards=range(world.size), device=device)
    return {
        method: Run(method, request, shape, whole if method == "none" else mine, world)
        for method in request.methods
    }


class Run:
    """A method on this rank's tensors.

    Args:
        method: one of `METHODS`.
        request: for its options.
        shape: of the whole sequence.
        inputs: this rank's, or for ``none`` the whole sequence's.
        world: all ranks.

    Attributes:
        takes_part: whether this rank has anything to do.
        schedule: of lvx, not ``auto`` any more; known after the first `kernels`.
    """

    def __init__(
        self, method: str, request: Request, shape: Shape, inputs: Inputs, world: Channel
    ) -> None:
        self.method = method
        self.takes_part = method != "none" or world.rank == 0
        self.schedule: str | None = None
        self._request = request
        self._shape = shape
        self._inputs = inputs
        self._world = world
        self._noted: tuple[NotingKernel, int] | None = None

    def step(self) -> list[float]:
        """One step, begun on all ranks together; times of its begin, end of forward, and end."""
        marks = self.wait()[:1]
        out = self._attend()
        marks.append(_now())
        out.backward(self._inputs.dout)
        marks.append(_now())
        self._clear()
        return marks

    def kernels(self) -> list[float]:
        """The step's kernels and projections alone, begun on all ranks together; times as above."""
        noting, in_forward = self._note()
        projected = None
        marks = self.wait()[:1]
        if self._inputs.is_projected:
            projected = self._inputs.k_and_v()
        noting.repeat(0, in_forward)
        marks.append(_now())
        noting.repeat(in_forward, len(noting.calls))
        if projected is not None:
            if self._recomputes:
                projected = self._inputs.k_and_v()
            torch.autograd.backward(projected, [k.detach() for k in projected])
        marks.append(_now())
        self._clear()
        return marks

    def wait(self) -> list[float]:
        """A barrier. Returns three times the time after it, for a rank that does nothing then."""
        get_accelerator().synchronize()
        self._world.barrier()
        return [time.perf_counter()] * 3

    def results(self) -> dict[str, Tensor]:
        """This rank's output and gradients."""
        out = self._attend()
        out.backward(self._inputs.dout)
        gradients = {f"d{name}": leaf.grad for name, leaf in self._inputs.leaves.items()}
        self._clear()
        return {"out": out.detach()} | {n: g for n, g in gradients.items() if g is not None}

    def counted(self) -> dict[str, Any]:
        """One step's bytes, as `ds_lvx.traffic` and as the interface count them.

        What TCP sends again is no traffic of the method: a step with such is counted anew, three
        times at most.
        """
        for _ in range(3):
            record, sent_again = self._counted_once()
            if not any(answer["again"] for answer in self._world.agree({"again": sent_again})):
                break
        return record

    def _counted_once(self) -> tuple[dict[str, Any], int]:
        """The record, and how many segments TCP sent again."""
        # Ranks that share an interface cannot tell whose bytes they were.
        alone = ranks_of_this_node() == 1
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "") if alone else ""
        self.wait()
        before = read_counters(interface)
        with traffic() as sent:
            if self.takes_part:
                self.step()
            else:
                self.wait()
            self.wait()
        after = read_counters(interface)
        if before is None or after is None:
            return {"traffic": _traffic_record(sent), "interface": None}, 0
        counters = after.since(before)
        carried = {**asdict(counters), "sent_payload_bytes": counters.sent_payload_bytes}
        record = {"traffic": _traffic_record(sent), "interface": carried}
        return record, counters.segments_sent_again

    @property
    def _recomputes(self) -> bool:
        return self._request.recompute and self.method.startswith("lvx")

    def _clear(self) -> None:
        for leaf in self._inputs.leaves.values():
            leaf.grad = None

    def _attend(self) -> Tensor:
        """By the public function."""
        inputs = self._inputs
        if self.method == "none":
            return self._attend_settled(choose(self._request.kernel, inputs.q))
        seen: dict[str, Any] = {
            "visibility": inputs.visibility,
            "kernel": self._request.kernel,
        }
        if self._recomputes:
            return ds_lvx.lv_xattn_recompute(
                inputs.q,
                inputs.keys["features"],
                inputs.project,
                schedule=self._schedule,
                **seen,
            )
        k, v = inputs.k_and_v()
        if self.method == "ring":
            return ds_lvx.ring_attention(inputs.q, k, v, **seen)
        if self.method == "ulysses":
            return ds_lvx.ulysses_attention(inputs.q, k, v, **seen)
        return ds_lvx.lv_xattn(inputs.q, k, v, schedule=self._schedule, **seen)

    def _attend_settled(self, kernel: Kernel) -> Tensor:
        """The same by the inner function, with a kernel of one's own."""
        inputs, call = self._inputs, self._call(kernel)
        if self._recomputes:
            features = inputs.keys["features"]
            return recompute.attend_recompute(
                call, inputs.q, features, inputs.project, inputs.visibility
            )[0]
        tensors = (inputs.q, *inputs.k_and_v())
        if self.method == "none":
            return LocalAttention.apply(call, inputs.visibility, *tensors)[0]
        if self.method == "ulysses":
            return ulysses.attend(call, *tensors, inputs.visibility)
        module = ring if self.method == "ring" else lvx
        return module.attend(call, *tensors, inputs.visibility)[0]

    @property
    def _schedule(self) -> str:
        return self.method.removeprefix("lvx-")

    def _call(self, kernel: Kernel) -> Call:
        inputs, shape = self._inputs, self._shape
        if self.method == "none":
            return Call(
                channel=Channel(None),
                q_lengths=(shape.seqlen_q,),
                kv_lengths=(shape.seqlen_kv,),
                kernel=kernel,
                softmax_scale=shape.head_dim**-0.5,
                requires_grad=True,
            )
        call = settle(
            "compare",
            inputs.q,
            {"features": inputs.keys["features"]}
            if self._recomputes
            else dict(zip("kv", inputs.k_and_v(), strict=True)),
            group=None,
            visibility=inputs.visibility,
            softmax_scale=None,
            kernel=self._request.kernel,
            schedule=self._schedule if self.method.startswith("lvx") else None,
        )
        self.schedule = call.schedule if self.method.startswith("lvx") else None
        return replace(call, kernel=kernel)

    def _note(self) -> tuple[NotingKernel, int]:
        """The kernel that has noted a step, and how many of its calls are forward's."""
        if self._noted is None:
            kernel = NotingKernel(choose(self._request.kernel, self._inputs.q))
            out = self._attend_settled(kernel)
            in_forward = len(kernel.calls)
            out.backward(self._inputs.dout)
            self._clear()
            self._noted = kernel, in_forward
        return self._noted


def _now() -> float:
    get_accelerator().synchronize()
    return time.perf_counter()


def _device() -> torch.device:
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(accelerator.current_device_name())


def _traffic_record(sent: Traffic) -> dict[str, Any]:
    return {
        "bytes_sent": sent.bytes_sent,
        "calls": sent.calls,
        "per_collective": {name: asdict(own) for name, own in sent.per_collective.items()},
        "control_bytes": sent.control.bytes_sent,
    }


if __name__ == "__main__":
    main()
