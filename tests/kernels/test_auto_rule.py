"""What ``auto`` takes by rule, by card and by what is visible."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_lvx import Visibility
from ds_lvx.kernels import auto as auto_module
from ds_lvx.kernels import triton_forward
from ds_lvx.kernels.auto import AutoKernel
from ds_lvx.kernels.choice import kernel_for
from ds_lvx.kernels.interface import Problem, Upstream
from ds_lvx.kernels.rule import Rule
from ds_lvx.kernels.table import table_of
from tests.kernels.batches import BATCHES, text
from tests.kernels.fake_cuda import pretend_gpu


@pytest.fixture(autouse=True)
def _some_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A card without a tuned table."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pretend_gpu(monkeypatch)
    table_of.cache_clear()
    yield
    table_of.cache_clear()


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0), (10, 0)])
def test_the_kernel_of_every_batch_on_a_card(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By rule: cuDNN or FlashAttention where one call does it (`BATCHES` says which), else Triton,
    as these calls are small."""
    before_hopper = capability < (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton_forward, "forward_kernel", None)  # not an interpreted one
    for name, batch in BATCHES.items():
        (samples, queries), keys = batch.sees.q_start.shape, batch.sees.kv_pos.shape[1]
        for dtype, head_dim in ((torch.bfloat16, 64), (torch.bfloat16, 20), (torch.float32, 64)):
            with FakeTensorMode():
                q = torch.empty(samples, queries, 4, head_dim, dtype=dtype, device="cuda")
                k = torch.empty(samples, keys, 2, head_dim, dtype=dtype, device="cuda")
            problem = Problem(q, k, k, Rule(batch.sees), softmax_scale=0.1)
            calls = ["none", "none"] if batch.calls is None else batch.calls
            one = all(line.startswith(f"0:{queries} x 0:{keys}") for line in calls)
            one = one or (before_hopper and "in one launch" in calls)
            able = dtype == torch.bfloat16 and head_dim % 8 == 0 and one
            expected = ("flash" if before_hopper else "cudnn") if able else "triton"
            auto = kernel_for("auto", q)
            taken = auto.choice(problem) if isinstance(auto, AutoKernel) else auto.name
            assert taken == (expected if capability >= (8, 0) else "native"), (name, dtype)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize(
    ("queries", "keys", "large"),
    [
        (60, 6_000, {"forward": False, "backward": False}),
        (600, 60_000, {"forward": False, "backward": True}),
        (2400, 120_000, {"forward": True, "backward": True}),
    ],
)
def test_a_few_large_slices_are_calls(
    capability: tuple[int, int],
    queries: int,
    keys: int,
    large: dict[str, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Text that sees its own of three videos and the next: a call a video, if each fills a card."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(triton_forward, "forward_kernel", None)
    row, key = torch.arange(queries) * 3 // queries, torch.arange(keys) * 3 // keys
    sees = Visibility(*(t.int()[None] for t in (row, row + 2, key)))
    with FakeTensorMode():
        q = torch.empty(1, queries, 32, 128, dtype=torch.bfloat16, device="cuda")
        k = torch.empty(1, keys, 8, 128, dtype=torch.bfloat16, device="cuda")
        lse = torch.empty(1, 32, queries, device="cuda")
    auto = kernel_for("auto", q)
    assert isinstance(auto, AutoKernel)
    before_hopper = capability < (9, 0)
    by_calls = "flash" if before_hopper else "cudnn"
    others = {"forward": "triton", "backward": "triton" if before_hopper else "triton_atomic"}
    problem = Problem(q, k, k, Rule(sees, sees), softmax_scale=0.1)
    for passes, upstream in (("forward", None), ("backward", Upstream(q, lse, lse))):
        expected = by_calls if large[passes] else others[passes]
        assert auto.choice(problem, upstream) == expected, passes


def test_where_bits_are_to_repeat_no_sum_is_without_an_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """cuDNN and the five products only without `torch.use_deterministic_algorithms`."""
    monkeypatch.setattr(triton_forward, "forward_kernel", None)
    sees = BATCHES["a window that slides"].sees
    keys = sees.kv_pos.shape[1]
    with FakeTensorMode():
        q = torch.empty(1, keys, 4, 64, dtype=torch.bfloat16, device="cuda")
        lse = torch.empty(1, 4, keys, device="cuda")
    auto, upstream = kernel_for("auto", q), Upstream(q, lse, lse)
    assert isinstance(auto, AutoKernel)
    exact = torch.empty_like(q, dtype=torch.float32)
    assert (
        kernel_for("auto", exact).choice(  # type: ignore[attr-defined]
            Problem(exact, exact, exact, Rule(sees, sees), softmax_scale=0.1), upstream
        )
        == "triton"
    )
    whole = Problem(q, q, q, softmax_scale=0.1)
    window = Problem(q, q, q, Rule(sees, sees), softmax_scale=0.1)
    assert [auto.choice(whole, upstream), auto.choice(window, upstream)] == [
        "cudnn",
        "triton_atomic",
    ]
    assert auto.choice(window) == "triton"
    assert auto._taken(window, upstream).name == "triton_atomic"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert [auto.choice(whole), auto.choice(window)] == ["cudnn", "triton"]
    assert [auto.choice(whole, upstream), auto.choice(window, upstream)] == ["flash", "triton"]
    assert auto._taken(window, upstream).name == "triton"


def test_what_a_hopper_takes_besides_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a shape is new: PyTorch's flash kernel where it is faster, or heads are wide."""
    monkeypatch.setattr(triton_forward, "forward_kernel", None)
    sees = text(24)
    found = {}
    for head_dim in (64, 128, 256):
        with FakeTensorMode():
            q = torch.empty(1, 24, 4, head_dim, dtype=torch.bfloat16, device="cuda")
            lse = torch.empty(1, 4, 24, device="cuda")
        auto = kernel_for("auto", q)
        assert isinstance(auto, AutoKernel)
        for name, one in (("all", None), ("causal", Rule(sees, sees))):
            problem = Problem(q, q, q, one, softmax_scale=0.1)
            for upstream in (None, Upstream(q, lse, lse)):
                passes = "forward" if upstream is None else "backward"
                found[head_dim, name, passes] = auto.choice(problem, upstream, without="cudnn")
    assert found == {
        (64, "all", "forward"): "triton",
        (64, "all", "backward"): "flash",
        (64, "causal", "forward"): "triton",
        (64, "causal", "backward"): "flash",
        (128, "all", "forward"): "triton",
        (128, "all", "backward"): "triton_atomic",
        (128, "causal", "forward"): "triton",
        (128, "causal", "backward"): "flash",
        **{(256, name, p): "flash" for name in ("all", "causal") for p in ("forward", "backward")},
    }
    monkeypatch.setattr(auto_module, "version_in_place", lambda: "FA3")
    assert auto_module.preferred("flash", q)
    assert not auto_module.preferred("cudnn", q)
