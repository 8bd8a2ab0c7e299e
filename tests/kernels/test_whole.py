"""Heads grouped and keys in parts: other shapes for the same attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ds_lvx.attention.oracle import attention_oracle
from ds_lvx.kernels import flash, whole
from ds_lvx.kernels.flash import stand_in

SCALE = 0.3
SHAPES = [  # B, S, T, H, K
    (1, 5, 37, 6, 2),
    (1, 40, 50, 6, 2),  # many queries: more tiles apart than together
    (2, 5, 37, 6, 2),
    (1, 5, 37, 3, 3),
    (1, 1, 37, 4, 1),  # one query: neither groups nor parts in forward
    (1, 9, 4, 4, 2),  # fewer keys than queries
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, int]]:
    """Samples, queries, heads and keys of each call; a tile has 8 queries, a part 8 keys or more,
    and 16 tiles run at a time."""
    made: list[tuple[int, int, int, int]] = []

    def kept(call: Any) -> Any:
        def kept_call(q: Tensor, k: Tensor, *rest: Tensor, **how: Any) -> Any:
            made.append((*q.shape[:3], k.shape[1]))
            return call(q, k, *rest, **how)

        return kept_call

    monkeypatch.setattr(flash, "_forward", kept(flash._forward))
    monkeypatch.setattr(flash, "_backward", kept(flash._backward))
    monkeypatch.setattr(whole, "processors", lambda tensor: 16)
    monkeypatch.setattr(whole, "_TILE", 8)
    monkeypatch.setattr(whole, "_LEAST_KEYS", 8)
    return made


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, ...], calls: list[Any]) -> None:
    batch, queries, keys, heads, kv_heads = shape
    torch.manual_seed(0)
    sizes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    leaves = [torch.randn(batch, *size, 8).double().requires_grad_() for size in sizes]
    exact_out, exact_lse = attention_oracle(*leaves, softmax_scale=SCALE)
    dout = torch.randn_like(exact_out)
    exact = torch.autograd.grad(exact_out, leaves, dout)
    q, k, v = (leaf.detach() for leaf in leaves)
    out, lse = flash.forward(q, k, v, causal=False, softmax_scale=SCALE)
    # As lse and delta of a layer over the keys of all ranks come: no part of this call knows them.
    delta = (dout * exact_out).sum(-1).transpose(1, 2).detach()
    gradients = flash.backward(
        q, k, v, dout, stand_in(dout, delta), exact_lse.detach(), causal=False, softmax_scale=SCALE
    )
    for found, right in zip((out, lse, *gradients), (exact_out, exact_lse, *exact), strict=True):
        assert found.shape == right.shape
        torch.testing.assert_close(found, right.detach(), atol=1e-12, rtol=1e-12)


def test_what_is_asked(calls: list[Any]) -> None:
    """Queries of 6 heads are 3 times as many of 2; 37 keys are 4 parts of 9, and one that is left.
    Two samples have tiles enough for no more."""
    for batch in (1, 2):
        q, k = torch.randn(batch, 5, 6, 8), torch.randn(batch, 37, 2, 8)
        out, lse = flash.forward(q, k, k, causal=False, softmax_scale=SCALE)
        flash.backward(q, k, k, q, out, lse, causal=False, softmax_scale=SCALE)
        flash.forward(q, q, q, causal=True, softmax_scale=SCALE)
        flash.forward(q[:, :1], k, k, causal=False, softmax_scale=SCALE)
    of_one = [(4, 15, 2, 9), (1, 15, 2, 1), (1, 15, 2, 37), (1, 5, 6, 5)]
    of_two = [(2, 15, 2, 37), (2, 15, 2, 37), (2, 5, 6, 5)]
    assert calls == [*of_one, (1, 1, 6, 37), *of_two, (2, 1, 6, 37)]


@pytest.mark.parametrize(
    ("tiles", "keys", "parts"),
    [
        (48, 128_080, 8),  # 192 queries of mllama, heads grouped: 384 of 396 places
        (96, 128_080, 4),  # 384 queries
        (1152, 23_072, 1),
        (8, 128_080, 16),  # one query in groups: 128 of 132
        (8, 3_000, 1),
        (1, 20_000, 8),  # as near as it gets
    ],
)
def test_parts_keep_the_multiprocessors_busy(tiles: int, keys: int, parts: int) -> None:
    assert whole.parts_of(tiles, 132, keys) == parts


def test_groups_are_undone() -> None:
    tensor = torch.randn(2, 5, 6, 4)
    grouped = whole.grouped(tensor, 2)
    assert grouped.shape == (2, 15, 2, 4)
    # Query 3 of head 4: the second of the three that share key/value head 1.
    assert torch.equal(grouped[:, 3 * 3 + 1, 1], tensor[:, 3, 4])
    assert torch.equal(whole._apart(grouped, 5), tensor)
    lse = torch.randn(2, 6, 5)
    assert torch.equal(whole._grouped_lse(lse, 2)[:, 1, 3 * 3 + 1], lse[:, 4, 3])
    assert torch.equal(whole._apart_lse(whole._grouped_lse(lse, 2), 5), lse)
