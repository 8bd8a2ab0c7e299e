"""lvx with the projection run again in backward: gradients everywhere, nothing kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_lvx
from ds_lvx.attention.call import Call
from ds_lvx.attention.features import share
from ds_lvx.attention.layout import Layout
from ds_lvx.attention.oracle import attention_oracle
from ds_lvx.attention.projection import Turns
from ds_lvx.attention.recompute import attend_recompute
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.choice import kernel_for
from tests.ranks import run_ranks

BATCH, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 2, 4, 2, 16, 24
Q_LENGTHS, KV_LENGTHS = (5, 2, 0), (9, 0, 31)


class Projection(nn.Module):
    """What a cross-attention layer does to the shared features; dropout as in LoRA."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        shape = (2 * KV_HEADS * HEAD_DIM, WIDTH)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator) / WIDTH**0.5)
        self.dropout = nn.Dropout(dropout)
        self.calls = 0

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        both = nn.functional.linear(self.dropout(features), self.weight)
        k, v = both.unflatten(-1, (2, KV_HEADS, HEAD_DIM)).unbind(2)
        return nn.functional.rms_norm(k, (HEAD_DIM,)), v


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    queries, keys = sum(Q_LENGTHS), sum(KV_LENGTHS)
    return {
        "q": torch.randn(BATCH, queries, HEADS, HEAD_DIM, generator=generator),
        "features": torch.randn(BATCH, keys, WIDTH, generator=generator),
        "dout": torch.randn(BATCH, queries, HEADS, HEAD_DIM, generator=generator),
    }


def cut(tensor: Tensor, lengths: tuple[int, ...], rank: int) -> Tensor:
    return tensor.split(lengths, dim=1)[rank].clone()


def run_layers(schedule: str, layers: int) -> dict[str, Any]:
    """Several layers over the same features: their gradients add up in one tensor."""
    rank = torch.distributed.get_rank()
    whole = inputs()
    q = cut(whole["q"], Q_LENGTHS, rank).requires_grad_()
    features = cut(whole["features"], KV_LENGTHS, rank).requires_grad_()
    projections = [Projection() for _ in range(layers)]
    x = q
    for projection in projections:
        x = x + ds_lvx.lv_xattn_recompute(x, features, projection, schedule=schedule)
    (x * cut(whole["dout"], Q_LENGTHS, rank)).sum().backward()
    for projection in projections:
        assert projection.calls == 2, f"projected {projection.calls} times"
    return {
        "out": x.detach(),
        "dq": q.grad,
        "dfeatures": features.grad,
        "dweights": [projection.weight.grad for projection in projections],
    }


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["ring", "gather"])
def test_gradients_reach_queries_features_and_projections(schedule: str) -> None:
    layers = 3
    answers = run_ranks(run_layers, 3, schedule, layers)
    whole = {name: value.double().requires_grad_() for name, value in inputs().items()}
    projections = [Projection().double() for _ in range(layers)]
    x = whole["q"]
    for projection in projections:
        x = x + attention_oracle(x, *projection(whole["features"]))[0]
    (x * whole["dout"]).sum().backward()

    assert_gradients(answers, x, whole, projections)


def assert_gradients(
    answers: list[dict[str, Any]],
    out: Tensor,
    whole: dict[str, Tensor],
    projections: list[Projection],
) -> None:
    """Compare what the ranks found with the whole in float64, its backward done."""

    def check(name: str, got: Tensor, exact: Tensor | None) -> None:
        assert exact is not None
        torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=1e-5, msg=name)

    for name, exact in (
        ("out", out.detach()),
        ("dq", whole["q"].grad),
        ("dfeatures", whole["features"].grad),
    ):
        check(name, torch.cat([answer[name] for answer in answers], dim=1), exact)
    for layer, projection in enumerate(projections):
        total = torch.stack([answer["dweights"][layer] for answer in answers]).sum(0)
        check(f"weight {layer}", total, projection.weight.grad)


def run_twice_alike(setting: str) -> list[Tensor]:
    """Gradients with recomputation and without it, in the same setting."""
    results = []
    for recompute in (True, False):
        torch.manual_seed(3)
        whole = inputs()
        q, features = whole["q"].requires_grad_(), whole["features"].requires_grad_()
        projection = Projection(dropout=0.3 if setting == "dropout" else 0.0)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast")
        with autocast:
            if setting == "autocast":
                q = q.detach().bfloat16().requires_grad_()
            if recompute:
                out = ds_lvx.lv_xattn_recompute(q, features, projection, schedule="replicated")
            else:
                k, v = projection(features)
                out = ds_lvx.lv_xattn(q, k.to(q.dtype), v.to(q.dtype), schedule="replicated")
        torch.rand(7)  # moves the generator on: backward must not depend on it
        (out * whole["dout"]).sum().backward()
        state = torch.get_rng_state()
        results.append([out.detach(), q.grad, features.grad, projection.weight.grad, state])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    return results[0][:-1]


class CastProjection(Projection):
    """Under autocast k is fp32 after the norm: cast, as models do."""

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().forward(features)
        return k.to(v.dtype), v


@pytest.mark.parametrize("setting", ["plain", "dropout", "autocast"])
def test_the_second_projection_is_the_first_one_again(setting: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("tests.attention.test_recompute.Projection", CastProjection)
    run_ranks(run_twice_alike, 2, setting) if setting == "plain" else run_twice_alike(setting)


def run_saved_bytes(keys: int, method: str) -> int:
    """Bytes that autograd holds for backward, without features and parameters."""
    torch.manual_seed(0)
    q = torch.randn(1, 8, HEADS, HEAD_DIM, requires_grad=True)
    features = torch.randn(1, keys, WIDTH, requires_grad=True)
    projection = Projection()
    position = torch.zeros(1, keys, dtype=torch.int32)
    bounds = torch.zeros(1, 8, dtype=torch.int32), torch.ones(1, 8, dtype=torch.int32)
    visibility = ds_lvx.Visibility(*bounds, position)
    shared = {features.data_ptr(), projection.weight.data_ptr(), position.data_ptr()}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in shared:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if method == "recompute":
            out = ds_lvx.lv_xattn_recompute(q, features, projection, visibility=visibility)
        else:
            out = ds_lvx.lv_xattn(q, *projection(features), visibility=visibility)
    _also_reachable(out.grad_fn, held, shared)
    out.sum().backward()
    return sum(held.values())


def _also_reachable(node: Any, held: dict[int, int], shared: set[int]) -> None:
    """Tensors that hang on a Function's context or its closures, not in save_for_backward."""
    seen: set[int] = set()

    def visit(value: Any, depth: int) -> None:
        if id(value) in seen or depth > 6:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() not in shared:
                held[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item, depth + 1)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item, depth + 1)
        elif callable(value) and getattr(value, "__closure__", None):
            for cell in value.__closure__:
                visit(cell.cell_contents, depth + 1)
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            visit(vars(value), depth + 1)

    visit(getattr(node, "__dict__", {}), 0)


def run_saved_bytes_of_both(keys: int) -> dict[str, list[int]]:
    return {
        method: [run_saved_bytes(count, method) for count in (keys, 8 * keys)]
        for method in ("recompute", "lvx")
    }


def test_nothing_of_the_size_of_the_keys_is_kept() -> None:
    for answer in run_ranks(run_saved_bytes_of_both, 2, 512):
        assert answer["recompute"][0] == answer["recompute"][1]
        # The measure works: without recomputation K and V show up in it.
        kv_bytes = 2 * 512 * KV_HEADS * HEAD_DIM * 4
        assert answer["lvx"][1] - answer["lvx"][0] >= 7 * kv_bytes


def run_frozen() -> tuple[bool, bool]:
    """Queries only: the projection and the features need no gradient."""
    whole = inputs()
    q = whole["q"].requires_grad_()
    projection = Projection().requires_grad_(False)
    ds_lvx.lv_xattn_recompute(q, whole["features"], projection).sum().backward()
    assert q.grad is not None
    with torch.no_grad():
        out = ds_lvx.lv_xattn_recompute(q, whole["features"], projection)
    return q.grad.abs().sum().item() > 0, out.requires_grad


def run_only_the_projection_trains() -> float:
    whole = inputs()
    projection = Projection()
    ds_lvx.lv_xattn_recompute(whole["q"], whole["features"], projection).sum().backward()
    assert projection.weight.grad is not None
    return projection.weight.grad.abs().sum().item()


def test_parts_may_be_frozen() -> None:
    assert run_ranks(run_frozen, 2) == [(True, False)] * 2
    assert all(total > 0 for total in run_ranks(run_only_the_projection_trains, 2))


def test_autograd_grad_may_ask_for_leaves() -> None:
    """Alone: features are a leaf here, and the caller wants their gradient and not ``.grad``."""
    whole = inputs()
    q, features = whole["q"].double().requires_grad_(), whole["features"].double().requires_grad_()
    projection = Projection().double()
    out = ds_lvx.lv_xattn_recompute(q, features, projection)
    exact, _ = attention_oracle(q, *projection(features))
    for wanted in ([features], [q, features], [q]):
        found, expected = (
            torch.autograd.grad(each.square().sum(), wanted, retain_graph=True)
            for each in (out, exact)
        )
        torch.testing.assert_close(found, expected)


def test_a_layer_may_be_applied_twice_to_features_that_layers_share() -> None:
    whole = inputs()
    q, features = whole["q"].double().requires_grad_(), whole["features"].double().requires_grad_()
    projection, kernel = Projection().double(), kernel_for("native", q)
    layout = Layout(Channel(None), (q.shape[1],), (features.shape[1],), device=q.device)
    call = Call(layout, kernel=kernel, softmax_scale=HEAD_DIM**-0.5, requires_grad=True)
    given, gradient = share(features)
    turns, x, exact = Turns(), q, q
    for _ in range(2):
        out, _ = attend_recompute(call, x, given, projection, shared=gradient, turns=turns)
        x, exact = x + out, exact + attention_oracle(exact, *projection(features))[0]
    leaves = (q, features, projection.weight)
    expected = torch.autograd.grad(exact.square().sum(), leaves)
    x.square().sum().backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected))


def test_a_projection_of_the_wrong_shape_says_so() -> None:
    q, features = torch.randn(1, 3, 4, 8), torch.randn(1, 5, 6)
    with pytest.raises(ValueError, match=r"k: got shape \[1, 5, 6\].*expected \[1, seqlen_kv"):
        ds_lvx.lv_xattn_recompute(q, features, lambda x: (x, x))
    with pytest.raises(ValueError, match=r"expected it to return \(k, v\)"):
        ds_lvx.lv_xattn_recompute(q, features, lambda x: x[0, 0, 0])
