"""One rank of a comparison of operators: the same tensors through every method, in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ds_lvx.compare.harness import GATHERED, meet, now, own_device
from ds_lvx.compare.network import counting
from ds_lvx.compare.operators import exactness
from ds_lvx.compare.operators.attend import NotingKernel, attend, recomputes
from ds_lvx.compare.operators.tensors import ORDERS, Shape, Shards, make_shards
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.pending import without_overlap
from ds_lvx.distributed.traffic import traffic
from ds_lvx.kernels.choice import kernel_for


@dataclass(frozen=True)
class Contest:
    """What is measured."""

    shape: Shape  # of the whole sequence
    # Some of `harness.METHODS`; ``none`` is all of it on rank 0, while the others wait.
    methods: Sequence[str]
    # K and V are projected again by lvx in backward; only with ``shape.features_dim``.
    recompute: bool = False
    overlap: bool = True  # transfers run under computation
    kernel: str = "auto"  # as in `ds_lvx.lv_xattn`
    # Some of `tensors.ORDERS`: who holds what, each by all methods but ``none``.
    orders: Sequence[str] = ORDERS[:1]
    warmup: int = 2  # rounds, in each of which every method has one step
    repeats: int = 10  # likewise


def measure(contest: Contest) -> dict[str, Any]:
    """Compare results, then time steps. Every rank of the world calls it.

    ``methods`` is empty where there are disagreements; each has ``forward_s`` and ``backward_s`` of
    every repeat, ``traffic`` of one step, and ``interface``, what left the interface in that step,
    where GLOO_SOCKET_IFNAME names it. ``none`` is in rank 0's answer only.

    Collectives: those of the methods, and agreements of 2 KiB on the CPU.
    """
    world, device = Channel.world(), own_device()
    found = check(contest, world, device)
    records = world.agree({"disagree": any(difference.is_too_large for difference in found)})
    differences = [asdict(difference) for difference in found]
    result: dict[str, Any] = {"rank": world.rank, "differences": differences, "methods": {}}
    if any(record["disagree"] for record in records):
        return result
    turns = {
        labelled(method, order): turn
        for order in contest.orders
        for method, turn in _turns(contest, replace(contest.shape, order=order), world, device)
        if order == contest.orders[0] or method != "none"
    }
    with nullcontext() if contest.overlap else without_overlap():
        for counts in [False] * contest.warmup + [True] * contest.repeats:
            for turn in turns.values():
                turn.step(counts=counts)
                turn.kernels(counts=counts)
                if counts and len(contest.orders) > 1:
                    turn.kernels_in_turn()
        for method, turn in turns.items():
            counted = turn.counted()
            if turn.takes_part:
                own = {**turn.seconds, "schedule": turn.schedule}
                result["methods"][method] = {**own, **counted}
    return result


def labelled(method: str, order: str) -> str:
    """The name of a method's record."""
    return method if order == ORDERS[0] else f"{method} {order}"


def check(contest: Contest, world: Channel, device: torch.device) -> list[exactness.Difference]:
    """This rank's differences: a small shape against the oracle, the whole shape among methods."""
    found = []
    shapes = {"small": exactness.small(contest.shape), "whole": contest.shape}
    for order, (name, of_any) in product(contest.orders, shapes.items()):
        shape = replace(of_any, order=order)
        results = {
            labelled(method, order): turn.results()
            for method, turn in _turns(contest, shape, world, device)
            if method != "none"
        }
        ranks, rank = world.size, world.rank
        if name == "small":
            results[exactness.EXACT] = exactness.exact(shape, ranks=ranks, rank=rank, device=device)
        found += exactness.differences(results, dtype=shape.dtype, rank=rank, shape=name)
    return found


def _turns(
    contest: Contest, shape: Shape, world: Channel, device: torch.device
) -> list[tuple[str, Turn]]:
    mine = make_shards(shape, ranks=world.size, shards=[world.rank], device=device)
    whole = mine
    if "none" in contest.methods and world.rank == 0:
        whole = make_shards(shape, ranks=world.size, shards=range(world.size), device=device)
    return [
        (method, Turn(method, contest, whole if method == "none" else mine, world))
        for method in contest.methods
    ]


class Turn:
    """A method on this rank's tensors, or for ``none`` on the whole sequence's."""

    def __init__(self, method: str, contest: Contest, shards: Shards, world: Channel) -> None:
        # Whether this rank has anything to do; else it waits.
        self.takes_part = method != "none" or world.rank == 0
        # Of lvx, not ``auto`` any more; known after the first `kernels`.
        self.schedule: str | None = None
        # Of every step that counts.
        self.seconds: dict[str, dict[str, list[float]]] = {
            "step": {"forward_s": [], "backward_s": []},
            "kernels": {"forward_s": [], "backward_s": [], "processor_s": []},
        }
        self._shards = shards
        self._world = world
        # Of as many shards of keys as the method projects here.
        self._projections = world.size if method == GATHERED else 1
        self._again = shards.is_projected and recomputes(method, contest.recompute)
        self._attend = partial(attend, method, shards, recompute_kv=contest.recompute)
        self._kernel = kernel_for(contest.kernel, shards.q)
        self._noted: tuple[NotingKernel, int] | None = None

    def results(self) -> dict[str, Tensor]:
        """This rank's output and gradients.

        Not those of weights that have projected the keys of all ranks: only their sum over the
        ranks is what others have.
        """
        found = self._shards.results(self._attend(self._kernel)[0])
        if self._projections == 1:
            return found
        return {name: t for name, t in found.items() if not name.endswith("_proj")}

    def step(self, *, counts: bool = False) -> None:
        """Forward and backward of one step, begun on all ranks together."""
        begin = meet(self._world)
        if not self.takes_part:
            return
        out, _ = self._attend(self._kernel)
        middle = now()
        out.backward(self._shards.dout)
        self._done("step", begin, middle, counts=counts)

    def kernels(self, *, counts: bool = False) -> None:
        """The step's kernels and projections alone, begun on all ranks together."""
        if self.takes_part and self._noted is None:
            noting = NotingKernel(self._kernel)
            out, self.schedule = self._attend(noting)
            self._noted = noting, len(noting.calls)
            self._shards.results(out)
        begin = meet(self._world)
        if self._noted is not None:
            self._done("kernels", begin, self._repeat(*self._noted), counts=counts)

    def kernels_in_turn(self) -> None:
        """The same, rank by rank, in time of the processor: ranks that share a core, or the parts
        of one, slow each other, and those with less to do leave the others alone."""
        for rank in range(self._world.size):
            meet(self._world)
            if rank == self._world.rank and self._noted is not None:
                begin = time.process_time()
                self._repeat(*self._noted)
                now()
                self.seconds["kernels"]["processor_s"].append(time.process_time() - begin)
                self._shards.clear()

    def _repeat(self, noting: NotingKernel, in_forward: int) -> float:
        """The noted calls again, and the projections; returns when forward ended."""
        projected = self._project()
        noting.repeat(0, in_forward)
        middle = now()
        noting.repeat(in_forward)
        if projected:
            if self._again:
                projected = self._project()
            torch.autograd.backward(projected, [k.detach() for k in projected])
        return middle

    def _done(self, what: str, begin: float, middle: float, *, counts: bool) -> None:
        end = now()
        self._shards.clear()
        if counts:
            self.seconds[what]["forward_s"].append(middle - begin)
            self.seconds[what]["backward_s"].append(end - middle)

    def _project(self) -> list[Tensor]:
        if not self._shards.is_projected:
            return []
        return [t for _ in range(self._projections) for t in self._shards.k_and_v()]

    def counted(self) -> dict[str, Any]:
        """One step's bytes, as `ds_lvx.traffic` and as the interface count them.

        What TCP sends again is no traffic of the method: a step with such is counted anew, three
        times at most.
        """
        for _ in range(3):
            meet(self._world)
            carried = counting()
            with traffic() as sent:
                self.step()
                meet(self._world)
            interface = carried()
            again = 0 if interface is None else interface["segments_sent_again"]
            if not any(answer["again"] for answer in self._world.agree({"again": again})):
                break
        return {
            "traffic": {
                "bytes_sent": sent.bytes_sent,
                "calls": sent.calls,
                "per_collective": {name: asdict(own) for name, own in sent.per_collective.items()},
                "control_bytes": sent.control.bytes_sent,
            },
            "interface": interface,
        }
