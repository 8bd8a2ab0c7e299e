"""Checkpointed functions in which attention runs once: the operators under all four functions."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ds_lvx
from ds_lvx.attention.auto import CLUSTERS
from ds_lvx.attention.replay import Box
from ds_lvx.distributed.channel import Channel
from tests.counts import Counts, boxes
from tests.ranks import run_ranks

HEADS, KV_HEADS, HEAD_DIM, WIDTH = 4, 2, 8, 12
HIDDEN = HEADS * HEAD_DIM
VARIANTS = ("deepspeed", "deepspeed non-reentrant", "torch", "torch reentrant")
METHODS = ("lvx ring", "lvx gather", "lvx recompute", "lvx chunks", "ring", "ulysses")


def plain(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def variant(name: str) -> Callable[..., Any]:
    """One of the four checkpoint functions, wrapped."""
    if name == "none":
        return plain
    return ds_lvx.checkpointing(
        {
            "deepspeed": deepspeed.checkpointing.checkpoint,
            "deepspeed non-reentrant": deepspeed.checkpointing.non_reentrant_checkpoint,
            "torch": partial(torch_checkpoint, use_reentrant=False),
            "torch reentrant": partial(torch_checkpoint, use_reentrant=True),
        }[name]
    )


class Layer(nn.Module):
    """Cross-attention with a projection of its own, and dropout around it."""

    def __init__(self, method: str, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.method = method
        self.q_proj = nn.Linear(HIDDEN, HIDDEN)
        self.kv_proj = nn.Linear(WIDTH, 2 * KV_HEADS * HEAD_DIM)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN)
        self.dropout = nn.Dropout(dropout)
        self.projections = 0

    def project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        self.projections += 1
        both = self.kv_proj(self.dropout(features)).unflatten(-1, (2, KV_HEADS, HEAD_DIM))
        return both[:, :, 0].contiguous(), both[:, :, 1].contiguous()

    def attend(self, q: Tensor, features: Tensor) -> Tensor:
        match self.method.split():
            case ["lvx", "recompute"]:
                return ds_lvx.lv_xattn_recompute(q, features, self.project)
            case ["lvx", "chunks"]:
                return ds_lvx.lv_xattn_recompute(q, features, self.project, kv_chunk_tokens=4)
            case ["lvx", schedule]:
                return ds_lvx.lv_xattn(q, *self.project(features), schedule=schedule)
            case ["ring"]:
                return ds_lvx.ring_attention(q, *self.project(features))
        return ds_lvx.ulysses_attention(q, *self.project(features))

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        q = self.q_proj(x if self.q_proj.weight.requires_grad else x.detach())
        q = q.unflatten(-1, (HEADS, HEAD_DIM))
        out = self.attend(q, features).flatten(2)
        return x + self.dropout(torch.tanh(self.o_proj(out)))


def setup(
    method: str, *, layers: int = 2, dropout: float = 0.0
) -> tuple[nn.ModuleList, Tensor, Tensor]:
    """Layers, and this rank's shards of x and features; the lengths differ between the ranks."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    stack = nn.ModuleList(Layer(method, dropout=dropout) for _ in range(2))
    torch.manual_seed(rank)
    x = torch.randn(1, 5 + rank, HIDDEN, requires_grad=True)
    features = torch.randn(1, 9 + 4 * rank, WIDTH, requires_grad=True)
    return stack, x, features


def run(stack: nn.ModuleList, x: Tensor, features: Tensor, wrap: Callable[..., Any]) -> Tensor:
    for layer in stack:
        x = wrap(layer, x, features)
    return x


def gradients(stack: nn.Module, *leaves: Tensor) -> list[Tensor]:
    return [leaf.grad for leaf in (*leaves, *stack.parameters()) if leaf.grad is not None]


def step(method: str, name: str, scenario: str) -> dict[str, Any]:
    """One of the scenarios, on this rank."""
    stack, x, features = setup(method, dropout=0.2 if scenario == "dropout" else 0.0)
    wrap = variant(name)
    # Once for each group, whoever comes first: not what a scenario is compared by.
    CLUSTERS.of(Channel.world(), x.device)
    torch.manual_seed(7)
    with Counts() as counts:
        SCENARIOS[scenario](stack, x, features, wrap)
    state = torch.get_rng_state()
    return {
        "gradients": gradients(stack, x, features),
        "counts": counts.figures(),
        "projections": [layer.projections for layer in stack],
        "boxes": boxes(),
        "state": state,
    }


def steps(method: str, scenario: str) -> dict[str, dict[str, Any]]:
    """The scenario without checkpoints and under each of the functions."""
    return {name: step(method, name, scenario) for name in ("none", *VARIANTS)}


def steps_of_each(cases: list[tuple[str, str]]) -> list[dict[str, dict[str, Any]]]:
    return [steps(*case) for case in cases]


def once_through(stack: nn.ModuleList, x: Tensor, features: Tensor, wrap: Any) -> None:
    run(stack, x, features, wrap).square().sum().backward()


def several_forwards(
    order: int, stack: nn.ModuleList, x: Tensor, features: Tensor, wrap: Any
) -> None:
    outs = [run(stack, x * scale, features, wrap) for scale in (1.0, 0.5, -1.0)]
    for out in outs[::order]:
        out.square().sum().backward()


def evaluation_between(stack: nn.ModuleList, x: Tensor, features: Tensor, wrap: Any) -> None:
    out = run(stack, x, features, wrap)
    with torch.no_grad():
        run(stack, 2 * x, features, wrap)
    out.square().sum().backward()


def exception_between(stack: nn.ModuleList, x: Tensor, features: Tensor, wrap: Any) -> None:
    def failing(*args: Tensor) -> Tensor:
        run(stack, *args, wrap)
        raise KeyError("in the middle of a checkpointed function")

    out = run(stack, x, features, wrap)
    with pytest.raises(KeyError):
        wrap(failing, x, features)
    out.square().sum().backward()


def nested(stack: nn.ModuleList, x: Tensor, features: Tensor, wrap: Any) -> None:
    outer = partial(run, stack, wrap=wrap)
    wrap(outer, x, features).square().sum().backward()


def accumulation(stack: nn.ModuleList, x: Tensor, features: Tensor, wrap: Any) -> None:
    for scale in (1.0, 0.5):
        run(stack, x * scale, features, wrap).square().sum().backward()


def frozen_projections(stack: nn.ModuleList, x: Tensor, features: Tensor, wrap: Any) -> None:
    for layer in stack:
        layer.kv_proj.requires_grad_(False)
    run(stack, x, features.detach(), wrap).square().sum().backward()


def wanted_by_one_rank(stack: nn.ModuleList, x: Tensor, features: Tensor, wrap: Any) -> None:
    """Only rank 0 has a gradient to pass through attention; rank 1 still has its part to send."""
    for layer in stack:
        layer.kv_proj.requires_grad_(False)
        layer.q_proj.requires_grad_(False)
    if torch.distributed.get_rank() == 1:
        features = features.detach()
    run(stack, x, features, wrap).square().sum().backward()


SCENARIOS: dict[str, Callable[..., None]] = {
    "once": once_through,
    "dropout": once_through,
    "first in first out": partial(several_forwards, 1),
    "last in first out": partial(several_forwards, -1),
    "evaluation": evaluation_between,
    "exception": exception_between,
    "nested": nested,
    "accumulation": accumulation,
    "frozen": frozen_projections,
    "wanted by one rank": wanted_by_one_rank,
}


@pytest.mark.parametrize("method", METHODS)
def test_the_second_pass_runs_no_kernel_and_sends_nothing(method: str) -> None:
    check([(method, "once"), (method, "dropout")])


@pytest.mark.slow
@pytest.mark.parametrize(
    "scenario", [name for name in SCENARIOS if name not in ("once", "dropout")]
)
def test_whatever_happens_between_the_passes(scenario: str) -> None:
    check([("lvx recompute", scenario), ("ulysses", scenario)])


def check(cases: list[tuple[str, str]]) -> None:
    """Compare checkpointed runs with the same one without checkpoints; a case: method, scenario."""
    for answer in run_ranks(steps_of_each, 2, cases):
        for (method, scenario), answers in zip(cases, answer, strict=True):
            wanted = answers.pop("none")
            for name, got in answers.items():
                assert_same(got, wanted, (method, scenario, name))


def assert_same(got: dict[str, Any], wanted: dict[str, Any], case: tuple[str, str, str]) -> None:
    method, scenario, _ = case
    assert got["counts"] == wanted["counts"], case
    assert len(got["gradients"]) == len(wanted["gradients"]) > 2, case
    for one, other in zip(got["gradients"], wanted["gradients"], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6, msg=str(case))
    assert got["boxes"] == 0, case
    if method in ("lvx recompute", "lvx chunks"):
        assert got["projections"] == wanted["projections"], case
    if scenario == "dropout":
        assert torch.equal(got["state"], wanted["state"]), case


def retained(method: str, name: str) -> dict[str, Any]:
    stack, x, features = setup(method)
    loss = run(stack, x, features, variant(name)).square().sum()
    with Counts() as first:
        loss.backward(retain_graph=True)
    once = [gradient.clone() for gradient in gradients(stack, x, features)]
    with Counts() as second:
        loss.backward()
    del loss
    twice = gradients(stack, x, features)
    return {
        "first": first.figures(),
        "second": second.figures(),
        "doubled": all(
            torch.allclose(2 * a, b, atol=1e-6) for a, b in zip(once, twice, strict=True)
        ),
        "boxes": boxes(),
    }


RETAINING = ("torch", "torch reentrant", "deepspeed non-reentrant")


def retained_by_each(method: str) -> dict[str, dict[str, Any]]:
    return {name: retained(method, name) for name in RETAINING}


@pytest.mark.parametrize("method", METHODS)
def test_a_second_backward_computes_for_real(method: str) -> None:
    for answers in run_ranks(retained_by_each, 2, method):
        for name, answer in answers.items():
            assert answer["first"][0] == 0, name
            # DeepSpeed's keeps what it has recomputed for as long as the graph.
            assert (answer["second"][0] > 0) == (name != "deepspeed non-reentrant"), name
            assert answer["doubled"], name
            assert answer["boxes"] == 0, name


def test_deepspeeds_own_function_has_no_second_backward() -> None:
    layer, x, features = Layer("lvx gather"), torch.randn(1, 3, HIDDEN), torch.randn(1, 4, WIDTH)
    loss = variant("deepspeed")(layer, x.requires_grad_(), features).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(TypeError):
        loss.backward()


def under_autocast(method: str, name: str) -> list[Tensor]:
    """Gradients of a step whose forward runs in bf16."""
    stack, x, features = setup(method)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(stack, x, features, variant(name))
    out.square().sum().backward()
    return gradients(stack, x, features)


def under_autocast_each(method: str) -> dict[str, list[Tensor]]:
    return {name: under_autocast(method, name) for name in ("none", *VARIANTS)}


@pytest.mark.parametrize("method", ["lvx recompute", "lvx gather", "ulysses"])
def test_autocast_is_that_of_the_first_pass(method: str) -> None:
    for answers in run_ranks(under_autocast_each, 2, method):
        expected = answers.pop("none")
        for name, got in answers.items():
            for one, other in zip(got, expected, strict=True):
                scale = other.abs().max()
                assert (one - other).abs().max() <= 0.02 * scale, name


KEEPING = ("lvx gather", "lvx recompute", "lvx chunks", "ring")


def kept_by_each() -> dict[str, list[int]]:
    """By method, for few and for many keys."""
    return {method: [kept_bytes(method, tokens) for tokens in (10, 1000)] for method in KEEPING}


def kept_bytes(method: str, tokens: int) -> int:
    """Bytes of the tensors in the boxes after a forward, alone in a group of one."""
    layer = Layer(method)
    x = torch.randn(1, 6, HIDDEN, requires_grad=True)
    features = torch.randn(1, tokens, WIDTH, requires_grad=True)
    out = variant("torch")(layer, x, features)
    kept = [tensor for box in gc.get_objects() if isinstance(box, Box) for tensor in _tensors(box)]
    assert out.requires_grad
    return sum(tensor.nbytes for tensor in kept)


def _tensors(box: Box) -> list[Tensor]:
    results = [kept.result for kept in box._kept if isinstance(kept.result, tuple)]
    return [item for result in results for item in result if isinstance(item, Tensor)]


def test_what_is_kept_does_not_depend_on_the_number_of_keys() -> None:
    (found,) = run_ranks(kept_by_each, 1)
    assert found == dict.fromkeys(KEEPING, [6 * HIDDEN * 4 + 6 * HEADS * 4] * 2)  # out and lse


class Changing:
    """A function that attends once in its first pass and twice in its second."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.runs = 0

    def __call__(self, x: Tensor, features: Tensor) -> Tensor:
        self.runs += 1
        for _ in range(self.runs):
            x = self.layer(x, features)
        return x


def test_a_function_that_changes_is_an_error() -> None:
    layer = Layer("lvx gather")
    x, features = torch.randn(1, 3, HIDDEN, requires_grad=True), torch.randn(1, 4, WIDTH)
    out = variant("torch reentrant")(Changing(layer), x, features)
    with pytest.raises(RuntimeError, match=r"got lv_xattn as its .* expected nothing more"):
        out.sum().backward()


def errors_of_changing_in_place() -> list[str]:
    """What a layer gets that writes to the result of its attention, by method and function."""
    torch.manual_seed(torch.distributed.get_rank())
    q, k, v = (torch.randn(1, 4, HEADS, 8, requires_grad=True) for _ in range(3))
    attends = {
        "lvx": ds_lvx.lv_xattn,
        "ulysses": ds_lvx.ulysses_attention,
        "hybrid": partial(ds_lvx.hybrid_attention, ulysses=2),
    }
    said = []
    for attend, name in product(attends.values(), ("torch", "torch reentrant")):
        out = variant(name)(lambda *x, run=attend: run(*x).mul_(2.0).sin(), q, k, v)
        try:
            out.sum().backward()
        except RuntimeError as error:
            said.append(str(error))
        else:
            said.append("nothing")
    return said


def test_a_result_that_is_changed_in_place_is_an_error() -> None:
    for said in run_ranks(errors_of_changing_in_place, 2):
        assert len(said) == 6
        for each in said:
            assert "has been changed in place" in each


@pytest.mark.parametrize("wrong", [torch.nn.functional.relu, lambda f, *a: f(*a), 3])
def test_another_function_is_an_error(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"got .*; expected\s+deepspeed.checkpointing.checkpoint"):
        ds_lvx.checkpointing(wrong)


def test_what_is_wrapped_stays_as_it_is() -> None:
    wrapped = ds_lvx.checkpointing(torch_checkpoint)
    assert ds_lvx.checkpointing(wrapped) is wrapped
    assert ds_lvx.checkpointing(partial(torch_checkpoint, use_reentrant=True)) is not wrapped
