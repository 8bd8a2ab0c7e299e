"""A step taken apart: who gets which time, in forward, in backward and while waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed.comm.comm as deepspeed_comm
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_lvx.compare.training.breakdown import (
    Breakdown,
    Marks,
    Parts,
    broken_down,
    zero_watched,
)
from ds_lvx.distributed.pending import Pending, Transfer, blocking
from ds_lvx.models import FAMILIES


class Clock:
    """Stands still unless someone works; also the marks of a step."""

    def __init__(self) -> None:
        self.now = 0.0
        self._moments: list[float] = []

    def mark(self) -> int:
        self._moments.append(self.now)
        return len(self._moments) - 1

    def read(self) -> list[float]:
        return [moment - self._moments[0] for moment in self._moments]

    def begun(self) -> Clock:
        self._moments = []
        return self


class Work(nn.Module):
    """Takes so many seconds in forward and in backward, and adds what its inside returns."""

    def __init__(
        self, clock: Clock, forward: float, backward: float, inside: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.clock, self.cost = clock, (forward, backward)
        self.cross_attn = inside

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = _Spend.apply(hidden_states, self.clock, *self.cost)
        return x if self.cross_attn is None else x + self.cross_attn(hidden_states=x)[0]


class Attention(Work):
    def __init__(self, clock: Clock, forward: float, backward: float) -> None:
        super().__init__(clock, forward, backward)
        self.during: Callable[[], None] = lambda: None

    def forward(self, hidden_states: Tensor) -> Any:
        self.during()
        return super().forward(hidden_states), None


class _Spend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, forward: float, backward: float) -> Tensor:
        ctx.clock, ctx.seconds = clock, backward
        ctx.save_for_backward(x)
        clock.now += forward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.saved_tensors  # noqa: B018  (what makes a checkpointed layer run again)
        ctx.clock.now += ctx.seconds
        return gradient, None, None, None


class Language(nn.Module):
    def __init__(self, layers: list[nn.Module], *, checkpointed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.checkpointed = checkpointed

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        for layer in self.layers:
            if self.checkpointed:
                inputs_embeds = checkpoint(layer, inputs_embeds, use_reentrant=False)
            else:
                inputs_embeds = layer(inputs_embeds)
        return inputs_embeds


class Model(nn.Module):
    """Vision 1 + 2 s, two layers of text 10 + 20 s each, their attention 100 + 200 s each."""

    def __init__(self, clock: Clock, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.clock = clock
        self.vision_model = Work(clock, 1, 2)
        layers = [Work(clock, 10, 20, Attention(clock, 100, 200)) for _ in range(2)]
        self.language_model = Language([*layers], checkpointed=checkpointed)
        self.lm_head = Work(clock, 1000, 2000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.language_model(inputs_embeds=self.vision_model(x))
        return _Spend.apply(self.lm_head(x), self.clock, 0.5, 0.25).sum()


def run_step(model: Model, clock: Clock) -> Breakdown:
    parts = Parts(model, FAMILIES.default().regions(), marks=clock.begun)
    with parts.recording() as breakdown:
        loss = model(torch.ones(2, requires_grad=True))
        parts.enter("backward")
        loss.backward()
        clock.now += 0.125  # what an engine does after autograd
        parts.enter("optimizer")
        clock.now += 7
    parts.remove()
    return breakdown


def whole(breakdown: Breakdown) -> float:
    return sum(sum(columns.values()) for columns in breakdown.parts_s.values())


def shown(breakdown: Breakdown, phase: str) -> dict[str, float]:
    return {part: s for part, s in breakdown.parts_s[phase].items() if s}


def test_each_part_gets_its_time_in_forward_and_backward() -> None:
    clock = Clock()
    found = run_step(Model(clock), clock)
    text, attention = 2 * 10 + 1000, 2 * 100
    wanted = {"vision": 1, "text": text, "cross_attention": attention, "rest": 0.5}
    assert shown(found, "forward") == wanted
    wanted = {"vision": 2, "text": 2 * text, "cross_attention": 2 * attention, "rest": 0.375}
    assert shown(found, "backward") == wanted
    assert shown(found, "optimizer") == {"rest": 7}
    assert whole(found) == clock.now


def test_a_checkpointed_layer_counts_again_in_backward() -> None:
    clock = Clock()
    found = run_step(Model(clock, checkpointed=True), clock)
    backward = shown(found, "backward")
    assert backward["cross_attention"] == 2 * (200 + 100)
    assert backward["text"] == 2 * (20 + 10) + 2000
    assert backward["vision"] == 2
    assert shown(found, "forward")["cross_attention"] == 2 * 100
    assert whole(found) == clock.now


def test_waiting_in_a_part_is_exposed_there_and_what_runs_meanwhile_hides_it() -> None:
    clock = Clock()
    model = Model(clock)

    class Handle:
        def wait(self) -> None:
            clock.now += 30

    def during() -> None:
        transfer = Pending("all_gather", [Handle()], lambda: None)
        clock.now += 5
        transfer.wait()
        with blocking("all_to_all"):
            clock.now += 3

    layer: Any = model.language_model.layers[0]
    layer.cross_attn.during = during
    found = run_step(model, clock)
    forward = shown(found, "forward")
    assert forward["exposed_cross_attention"] == 33
    assert forward["cross_attention"] == 205
    assert found.hidden_s == {"forward": 5, "backward": 0, "optimizer": 0}
    assert whole(found) == clock.now


def test_zero_s_transfers_are_told_once_and_the_backend_is_put_back() -> None:
    clock = Clock()

    class Work:
        def wait(self) -> str:
            clock.now += 2
            return "done"

    class Backend:
        name = "fake"

        def all_reduce(self, tensor: str) -> str:
            clock.now += 1
            return tensor

        def all_gather_into_tensor(self) -> Work:
            return Work()

    before, backend = deepspeed_comm.cdb, Backend()
    deepspeed_comm.cdb = backend
    told: list[Transfer] = []
    try:
        with zero_watched(told.append, clock=lambda: clock.now):
            watched: Any = deepspeed_comm.cdb
            assert watched.name == "fake"
            assert watched.all_reduce("x") == "x"
            handle = watched.all_gather_into_tensor()
            clock.now += 4
            assert (handle.wait(), handle.wait()) == ("done", "done")
        assert deepspeed_comm.cdb is backend
    finally:
        deepspeed_comm.cdb = before
    assert told == [
        Transfer("zero all_reduce", 0, 0, 1),
        Transfer("zero all_gather_into_tensor", 1, 5, 7),
    ]


def test_waits_inside_waits_count_once_and_stay_in_their_phase() -> None:
    changes = [(0.0, "forward", "rest"), (10.0, "forward", "text"), (20.0, "backward", "rest")]
    transfers = [
        Transfer("all_to_all", 11, 11, 14),  # Ulysses ...
        Transfer("zero all_to_all_single", 12, 12, 13),  # ... by DeepSpeed's backend
        Transfer("zero all_reduce", 21, 25, 27),
        Transfer("agreement", 1, 1, 2),
        Transfer("send_recv", 2, 15, 16),
        Transfer("send_recv", 3, 16, 18),
    ]
    found = broken_down(changes, 30.0, transfers)
    assert shown(found, "forward") == {
        "rest": 9,
        "exposed_rest": 1,
        "text": 10 - 3 - 3,
        "exposed_text": 6,
    }
    assert shown(found, "backward") == {"rest": 8, "exposed_zero": 2}
    # From 2 to 18 without the waits of the all-to-all and of its own; from 21 to 25.
    assert found.hidden_s == {"forward": 16 - 3 - 3, "backward": 4, "optimizer": 0}
    assert whole(found) == 30


def test_a_model_of_other_names_is_refused() -> None:
    with pytest.raises(ValueError, match="got a Linear without a module named like"):
        Parts(nn.Linear(2, 2), FAMILIES.default().regions())


@pytest.mark.gpu
def test_on_cuda_moments_are_those_of_the_stream() -> None:
    a = torch.randn(4096, 4096, device="cuda")
    found = Marks()
    found.mark()
    for _ in range(50):
        a = a @ a
    found.mark()
    found.mark()
    start, worked, end = found.read()
    # The host is through long before the device: 50 products of 137 GFLOP each take a while.
    assert start == 0.0
    assert worked > 1e-3
    assert 0.0 <= end - worked < worked
