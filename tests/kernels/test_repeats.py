"""cuDNN is taken for shapes that have come often enough."""

from __future__ import annotations

import pytest
import torch

from ds_lvx.kernels import auto as auto_module
from ds_lvx.kernels import repeats
from ds_lvx.kernels.auto import AutoKernel
from ds_lvx.kernels.repeats import Repeats, repeats_on
from ds_lvx.kernels.table import kind_of
from tests.kernels.test_auto import kernels, problem_of, table, upstream_of


def test_a_shape_pays_when_what_it_saved_is_what_it_costs() -> None:
    found = Repeats(1.0)
    assert [found.pay("a", saved_s=0.4) for _ in range(5)] == [False] * 3 + [True] * 2
    assert not found.pay("b", saved_s=0.4)
    assert [found.pay("two", saved_s=0.5, count=2) for _ in range(5)] == [False] * 4 + [True]
    assert Repeats(0.0).pay("a", saved_s=0.0)


def test_shapes_that_do_not_come_again_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "_MOST", 2)
    found = Repeats(1.0)
    for shape in ("a", "b", "a", "c", "d"):
        found.pay(shape, saved_s=0.6)
    assert list(found._saved_s) == ["c", "d"]
    assert not found.pay("a", saved_s=0.6)


def test_a_process_has_one_memory_a_device() -> None:
    device = torch.device("cpu")
    assert repeats_on(device) is repeats_on(torch.device("cpu"))


def test_auto_takes_cudnn_when_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """By shape and direction; a table that has chosen it waits as well."""
    monkeypatch.setattr(auto_module, "capability", lambda q: 90)
    found, kept = kernels(), Repeats(0.5)
    auto = AutoKernel(found, table(), kept)
    whole = problem_of(None)
    seconds = 4.0 * 4 * 16 * 5 * 300 * 5e-16  # heads, head_dim, queries, keys
    kept._preparing_s = 2.5 * seconds
    for _ in range(5):
        auto.forward(whole)
    assert found["triton"].calls == ["forward"] * 3  # type: ignore[attr-defined]
    assert found["cudnn"].calls == ["forward"] * 2  # type: ignore[attr-defined]
    auto.backward(whole, upstream_of(whole))  # 2.5 times the operations, twice saved on each
    auto.backward(whole, upstream_of(whole))
    assert found["flash"].calls == ["backward"]  # type: ignore[attr-defined]
    assert found["cudnn"].calls[2:] == ["backward"]  # type: ignore[attr-defined]
    other = problem_of(None, (1, 6, 300, 4, 2, 16))
    auto.forward(other)
    assert found["triton"].calls[3:] == ["forward"]  # type: ignore[attr-defined]
    tuned = table()
    tuned.add(kind_of(other, None), {"chosen": "cudnn"})
    AutoKernel(found, tuned, Repeats(1.0)).forward(other)
    assert found["triton"].calls[4:] == ["forward"]  # type: ignore[attr-defined]
    AutoKernel(found, tuned, Repeats(1.0)).settled().forward(other)
    assert found["cudnn"].calls[3:] == ["forward"]  # type: ignore[attr-defined]
