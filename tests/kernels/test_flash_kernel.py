"""The flash kernel: PyTorch's flash calls, slice by slice, against float64 and CUDA's shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ds_lvx import Visibility
from ds_lvx.attention.oracle import attention_oracle
from ds_lvx.config.registry import KERNELS
from ds_lvx.kernels import covering, cudnn, flash
from ds_lvx.kernels.choice import kernel_for, obstacle
from ds_lvx.kernels.cover import Cover, Order
from ds_lvx.kernels.covering import cover_of
from ds_lvx.kernels.flash_kernel import FlashKernel
from ds_lvx.kernels.interface import Problem, Upstream
from ds_lvx.kernels.rule import Rule
from tests.kernels.batches import BATCHES, prefix, rows
from tests.kernels.fake_cuda import WithoutCuda
from tests.kernels.test_cover import anything
from tests.largest import LargestTensor

COVERED = [name for name, batch in BATCHES.items() if batch.calls is not None]
HEADS, KV_HEADS, HEAD_DIM, SCALE = 4, 2, 8, 0.3


class Asked(FlashKernel):
    """Keeps what it asks of PyTorch: samples, queries and keys of each call, and whether causal.

    One call for each rectangle, also where one launch could do them all.
    """

    _has_sequences = False

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, int, int], bool]] = []

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Any:
        self.calls.append(((*q.shape[:2], k.shape[1]), how["causal"]))
        return super()._attend(q, k, v, **how)

    def _gradients(self, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor, **how: Any) -> Any:
        self.calls.append(((*q.shape[:2], k.shape[1]), how["causal"]))
        return super()._gradients(q, k, v, *rest, **how)


def tensors(sees: Visibility, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and dout."""
    (batch, queries), keys = sees.q_start.shape, sees.kv_pos.shape[1]
    torch.manual_seed(0)
    sizes = ((queries, HEADS), (keys, KV_HEADS), (keys, KV_HEADS), (queries, HEADS))
    return [torch.randn(batch, *size, HEAD_DIM).to(dtype) for size in sizes]


def of_oracle(sees: Visibility, inputs: list[Tensor]) -> list[Tensor]:
    """out, lse, dq, dk, dv in float64."""
    q, k, v, dout = (t.double() for t in inputs)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = attention_oracle(*leaves, visibility=sees, softmax_scale=SCALE)
    gradients = torch.autograd.grad(out, leaves, dout, allow_unused=True)
    found = [
        torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=True)
    ]
    return [t.detach() for t in (out, lse, *found)]


def of_kernel(
    kernel: FlashKernel,
    sees: Visibility,
    inputs: list[Tensor],
    *,
    into: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    q, k, v, dout = inputs
    problem = Problem(q, k, v, Rule(sees), softmax_scale=SCALE)
    assert kernel.serves(problem)
    out, lse = kernel.forward(problem)
    delta = (dout.double() * out.double()).sum(-1).transpose(1, 2).to(lse.dtype)
    targets = None if into is None else (into(k), into(v))
    gradients = kernel.backward(problem, Upstream(dout, lse, delta), into=targets)
    if targets is not None:
        assert all(a is b for a, b in zip(gradients[1:], targets, strict=True))
    return [out, lse, *gradients]


def largest(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest error; infinities must agree."""
    worst = 0.0
    for one, other in zip(found, exact, strict=True):
        finite = other.isfinite()
        assert torch.equal(finite, one.isfinite())
        if one.numel():
            gap = one.detach().double() - other
            worst = max(worst, float(gap.where(finite, 0.0).abs().max()))
    return worst


@pytest.mark.parametrize("name", COVERED)
def test_every_cover_against_float64(name: str) -> None:
    """Outputs, lse and gradients; the calls are those of the cover, twice."""
    sees, kernel = BATCHES[name].sees, Asked()
    inputs = tensors(sees)
    found = of_kernel(kernel, sees, inputs)
    assert largest(found, of_oracle(sees, inputs)) < 1e-12
    cover = cover_of(sees)
    assert cover is not None
    assert kernel.calls == 2 * [(each.size, each.causal) for each in cover.rectangles]


def images_out_of_order() -> Visibility:
    """Rows of three images that do not lie side by side, as ranks deal them, behind two that see
    all."""
    start = torch.tensor([[-1, -1, 0, 1, 2, 2, 1, 0]], dtype=torch.int32)
    end = torch.tensor([[9, 9, 1, 2, 3, 3, 2, 1]], dtype=torch.int32)
    return Visibility(start, end, torch.tensor([[0, 0, 1, 1, 2, 2]], dtype=torch.int32))


def test_queries_that_see_all_stand_beside_one_launch() -> None:
    sees = images_out_of_order()
    cover = cover_of(sees)
    assert cover is not None
    assert cover.sequences is not None
    assert len(cover.whole) == 1
    inputs = tensors(sees)
    assert largest(of_kernel(FlashKernel(), sees, inputs), of_oracle(sees, inputs)) < 1e-12


@pytest.mark.parametrize("decade", range(3))
def test_whatever_comes(decade: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """dk and dv go to given tensors of any strides, over whatever was in them."""
    for seed in range(25 * decade, 25 * decade + 25):
        monkeypatch.setattr(covering, "_CALL", (0, 5, 4096)[seed % 3])
        sees = anything(seed)
        inputs = tensors(sees)

        def target(like: Tensor) -> Tensor:
            return torch.randn(*like.shape[:2], 5, HEAD_DIM, dtype=like.dtype)[:, :, 2:4]

        found = of_kernel(FlashKernel(), sees, inputs, into=target)
        assert largest(found, of_oracle(sees, inputs)) < 1e-12, seed


@pytest.mark.parametrize("name", COVERED)
def test_16_bits_err_as_one_call_does(name: str) -> None:
    """What is summed over slices is rounded as seldom as may be."""
    sees = BATCHES[name].sees
    inputs = tensors(sees, torch.bfloat16)
    exact = of_oracle(sees, inputs)
    found = of_kernel(FlashKernel(), sees, inputs)
    assert [t.dtype for t in found[3:]] == [torch.bfloat16] * 2
    scale = max((float(t.abs().max()) for t in exact[2:] if t.numel()), default=1.0)
    assert largest(found, exact) < 2e-2 * max(scale, 1.0)


def test_many_parts_of_a_gradient_are_added_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen parts of the first key's gradients: the error is not that of sixteen roundings."""
    sees = rows((*prefix(1600, 16), torch.arange(16)))
    cover = cover_of(sees)
    assert cover is not None
    assert cover.is_deep
    inputs = tensors(sees, torch.bfloat16)
    inputs[3] = inputs[3].abs()  # parts that add up
    exact = of_oracle(sees, inputs)

    def error() -> float:
        dv = of_kernel(FlashKernel(), sees, inputs)[4]
        return float(((dv.double() - exact[4])[:, 0] / exact[4][:, 0]).abs().mean())

    in_fp32 = error()
    monkeypatch.setattr(Cover, "is_deep", False)
    assert in_fp32 < 0.7 * error()


@pytest.mark.parametrize("name", COVERED)
def test_folding_merges_into_a_result_over_other_keys(name: str) -> None:
    sees = BATCHES[name].sees
    q, k, v, other = tensors(sees)
    problem = Problem(q, k, v, Rule(sees), softmax_scale=SCALE)
    out, lse = other.clone(), torch.randn(len(q), HEADS, q.shape[1], dtype=torch.float64)
    part_out, part_lse = of_oracle(sees, [q, k, v, other])[:2]
    total = torch.logaddexp(lse, part_lse)
    weights = [(part - total).exp().transpose(1, 2)[..., None] for part in (lse, part_lse)]
    expected = [weights[0] * out + weights[1] * part_out, total]
    FlashKernel().fold(problem, (out, lse))
    assert largest([out, lse], expected) < 1e-12


def test_what_it_does_not_serve_native_does() -> None:
    """A rule of too many slices, and a gradient of lse."""
    sees = BATCHES["a window that slides"].sees
    q, k, v, dout = tensors(sees)
    problem = Problem(q, k, v, Rule(sees), softmax_scale=SCALE)
    assert not FlashKernel().serves(problem)
    out, lse = FlashKernel().forward(problem)
    running = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    FlashKernel().fold(problem, running)
    upstream = Upstream(dout, lse, (dout * out).sum(-1).transpose(1, 2))
    gradients = FlashKernel().backward(problem, upstream)
    exact = of_oracle(sees, [q, k, v, dout])
    assert largest([out, lse, *gradients], exact) < 1e-12
    assert largest(list(running), exact[:2]) < 1e-12
    whole = Problem(q, k, v, softmax_scale=SCALE)
    assert FlashKernel().serves(whole, upstream)
    dlse = Upstream(dout, lse, lse, has_dlse=True)
    assert not FlashKernel().serves(whole, dlse)
    assert FlashKernel().backward(whole, dlse)[0].isfinite().all()


# ---- CUDA's operators, without a GPU


class Operators(TorchDispatchMode):
    """Keeps the flash operators that are called: name, ``[S, T]`` and whether causal."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[int], bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.").removesuffix(".default")
        if name.startswith("_flash_attention"):
            q, k, *_ = args[1:] if name.endswith("backward") else args
            lengths, longest = (args[6:8], args[8:10]) if len(args) > 10 else (args[3:5], args[5:7])
            assert all(t.is_cuda and t.dtype == torch.int32 for t in lengths)
            assert all(t.shape == lengths[0].shape for t in lengths)
            assert longest[0] <= len(q)
            assert longest[1] <= len(k)
            causal = bool(args[11 if name.endswith("backward") else 8])
            self.calls.append((name, [len(q), len(k)], causal))
            return func(*args, **kwargs or {})
        if "flash_attention" in name:
            backward = name.endswith("backward")
            q, k = args[1:3] if backward else args[:2]
            assert all(t.is_cuda and t.stride(-1) == 1 for t in args[: 5 if backward else 3])
            assert not backward or args[5].is_contiguous()
            place = 11 if backward else 4  # defaults at the end are left out
            causal = len(args) > place and bool(args[place])
            self.calls.append((name, [q.shape[2], k.shape[2]], causal))
        return func(*args, **kwargs or {})


def on_fake_cuda(sees: Visibility) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """Inputs, results and calls of forward and backward on CUDA tensors that hold nothing."""
    cover = cover_of(sees)
    assert cover is not None
    sizes, rule = [t.shape for t in tensors(sees)], Rule(sees)
    with FakeTensorMode(), Operators() as operators, WithoutCuda():
        inputs = [torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in sizes]
        orders = [
            None
            if order is None
            else Order(torch.empty(order.places.shape, dtype=torch.int64, device="cuda"))
            for order in (cover.queries, cover.keys)
        ]
        sequences = cover.sequences
        if sequences is not None:
            bounds = torch.empty(len(sequences.queries), dtype=torch.int32, device="cuda")
            sequences = replace(sequences, queries=bounds, keys=bounds)
        rule.__dict__["cover"] = replace(
            cover, queries=orders[0], keys=orders[1], sequences=sequences
        )
        q, k, v, dout = inputs
        problem = Problem(q, k, v, rule, softmax_scale=SCALE)
        out, lse = FlashKernel().forward(problem)
        assert out.is_cuda
        assert lse.is_cuda
        assert lse.dtype == torch.float32
        gradients = FlashKernel().backward(problem, Upstream(dout, lse, lse))
    return inputs, [out, lse, *gradients], operators.calls


@pytest.mark.parametrize("name", COVERED)
def test_cudas_flash_operators_take_every_cover(name: str) -> None:
    """PyTorch's shape functions for CUDA: no fp32 product, squares where causal, nothing empty."""
    sees = BATCHES[name].sees
    (q, k, v, _), found, calls = on_fake_cuda(sees)
    assert [t.shape for t in found] == [
        q.shape,
        (len(q), HEADS, q.shape[1]),
        *(t.shape for t in (q, k, v)),
    ]
    assert [t.dtype for t in found[3:]] == [torch.bfloat16] * 2
    cover = cover_of(sees)
    assert cover is not None
    if cover.sequences is not None:
        ends = [
            cover.shape[0] * (length if order is None else order.places.shape[1])
            for order, length in zip((cover.queries, cover.keys), cover.shape[1:], strict=True)
        ]
        passes = ("_flash_attention_forward", "_flash_attention_backward")
        assert calls == [(one, ends, cover.sequences.causal) for one in passes]
        return
    forward = "_scaled_dot_product_flash_attention"
    expected = []
    for backward in (False, True):
        for each in cover.rectangles:
            _, queries, keys = each.size
            # Two heads of q that share one of K and V are twice the queries of one. In forward that
            # saves tiles of 128 queries, up to 64 of them.
            groups = not each.causal and (queries <= keys if backward else 1 < queries <= 64)
            rows = queries * HEADS // KV_HEADS if groups else queries
            expected.append((forward + "_backward" * backward, [rows, keys], each.causal))
    assert calls == expected
    for _, (queries, keys), causal in calls:
        assert queries
        assert keys
        assert not causal or queries == keys


@pytest.mark.parametrize("calls", [flash, cudnn], ids=["flash", "cudnn"])
def test_operators_are_called_as_pytorch_declares_them(calls: ModuleType) -> None:
    """On tensors without a device: its shape inference checks the arguments."""
    q, k, v = (
        torch.empty(2, length, heads, 64, dtype=torch.bfloat16, device="meta")
        for length, heads in ((8, 4), (64, 2), (64, 2))
    )
    for causal, keys, values in ((False, k, v), (True, k[:, :8], v[:, :8])):
        how = {"causal": causal, "softmax_scale": 0.1}
        out, lse = calls.forward(q, keys, values, **how)
        assert out.shape == q.shape
        assert lse.shape == (2, 4, 8)
        found = calls.backward(q, keys, values, q, flash.stand_in(q, lse), lse, **how)
        assert [each.shape for each in found] == [q.shape, keys.shape, values.shape]


def test_who_can_what() -> None:
    q = torch.empty(2, 8, 4, 64, dtype=torch.bfloat16)
    assert flash.cuda_can(q)
    assert not flash.cuda_can(q.float())
    assert not flash.cuda_can(q[..., :12])
    able = KERNELS["cudnn"]
    assert "on cpu, where it needs an NVIDIA GPU" in (obstacle(able, q) or "")
    with pytest.raises(ValueError, match=r"'cudnn' for tensors on cpu.*use 'native' or 'flash'"):
        kernel_for("cudnn", q)
    with FakeTensorMode(), WithoutCuda():
        q, exact, wide, odd = (
            torch.empty(1, 1, 1, head_dim, dtype=dtype, device="cuda")
            for head_dim, dtype in (
                (64, torch.bfloat16),
                (64, torch.float32),
                (256, torch.bfloat16),
                (20, torch.bfloat16),
            )
        )
        assert obstacle(able, q) is None
        assert "torch.float32" in (obstacle(able, exact) or "")
        assert "head_dim 256, where it does 8 to 128" in (obstacle(able, wide) or "")
        assert "head_dim 20, where it does 16 bits and 8, 16" in (obstacle(able, odd) or "")


def test_a_stand_in_is_made_range_by_range(monkeypatch: pytest.MonkeyPatch) -> None:
    dout, delta = torch.randn(2, 50, 3, 16).bfloat16(), torch.randn(2, 3, 50)
    dout[:, 7] = 0.0
    delta[:, :, 7] = 0.0
    whole = flash.stand_in(dout, delta)
    monkeypatch.setattr(flash, "_CPU_STAND_IN_NUMBERS", 8 * dout[:, :1].numel())
    with LargestTensor(torch.float32) as largest:
        assert torch.equal(flash.stand_in(dout, delta), whole)
    assert 0 < largest.elements <= dout.numel() // 6
    assert flash.stand_in(dout[:, :0], delta[:, :, :0]).shape == (2, 0, 3, 16)
