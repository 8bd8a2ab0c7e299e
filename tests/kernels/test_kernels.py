"""Kernels in one process: forward and backward given a lse, against the float64 oracle."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from ds_lvx import Visibility
from ds_lvx.attention.oracle import attention_oracle
from ds_lvx.config.registry import KERNELS
from ds_lvx.kernels import flash, onednn
from ds_lvx.kernels.choice import kernel_for
from ds_lvx.kernels.interface import Kernel, Problem, Upstream, written
from ds_lvx.kernels.merge import empty_part, merge
from ds_lvx.kernels.native import NativeKernel
from ds_lvx.kernels.rule import Rule
from ds_lvx.kernels.visibility import EVERYTHING
from tests.kernels.asking import backward, fold, forward
from tests.largest import LargestTensor

Named: TypeAlias = Callable[[str, torch.dtype], Kernel]

SHAPES = [  # batch, queries, keys, heads, kv heads, head_dim
    (1, 1, 1, 1, 1, 16),
    (2, 7, 300, 4, 2, 16),
    (1, 33, 1000, 6, 1, 64),
    (2, 5, 4500, 2, 2, 24),
    (1, 3, 40, 3, 3, 80),
    (1, 2, 9, 2, 1, 256),
]


APART = {"flash", "cudnn", "triton", "triton_atomic"}
"""Their tests are elsewhere."""
NAMES = ("fused", *(name for name in KERNELS if name not in APART))


@pytest.fixture(params=["as here", "fused"])
def _products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``native`` takes on this machine's processor, and what it takes on others."""
    if request.param == "fused":
        monkeypatch.setattr(onednn, "serves", lambda: False)


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, torch.dtype], Kernel]:
    """Kernels by name; ``fused`` is what ``native`` takes on other processors."""

    def kernel_of(name: str, dtype: torch.dtype) -> Kernel:
        if name == "fused":
            monkeypatch.setattr(onednn, "serves", lambda: False)
        return kernel_for("native" if name == "fused" else name, like(dtype))

    return kernel_of


def like(dtype: torch.dtype, head_dim: int = 16) -> Tensor:
    """Queries as `kernel_for` looks at them."""
    return torch.empty(1, 1, 1, head_dim, dtype=dtype)


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    batch, queries, keys, heads, kv_heads, head_dim = shape
    torch.manual_seed(0)
    return [
        torch.randn(batch, length, count, head_dim).to(dtype)
        for length, count in ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    ]


def rule(shape: tuple[int, ...], name: str) -> Visibility | None:
    batch, queries, keys = shape[:3]
    if name == "none":
        return None
    if name == "branches":
        return branches(*shape[:3])
    row, position = torch.arange(queries), torch.arange(keys) // 3
    start, end = row * 2, row * 2 + 40
    start[::4] = -1
    end[1::4] = start[1::4]
    position[::11] = -1
    if name == "shuffled":
        position = position[torch.randperm(keys)]
    return Visibility(*(t.int().repeat(batch, 1) for t in (start, end, position)))


def branches(batch: int, queries: int, keys: int) -> Visibility:
    """A prompt and three completions behind it: a query sees the prompt, and its own up to itself.

    Gaps of the prompt and of the first completion are empty. One query sees nothing by its range,
    one by its gap, and one key is seen by nobody.
    """
    row, position = torch.arange(queries) * keys // queries, torch.arange(keys)
    prompt = keys // 3
    length = max((keys - prompt) // 3, 1)
    begin = prompt + (row - prompt) // length * length
    start, end, gap = torch.zeros_like(row), row + 1, torch.full_like(row, prompt)
    end[1:2] = 0
    gap[3:4], begin[3:4] = -1, EVERYTHING
    position[5:6] = EVERYTHING
    return Visibility(*(t.int().repeat(batch, 1) for t in (start, end, position, gap, begin)))


@pytest.mark.parametrize("visibility", ["none", "frames", "shuffled", "branches"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(
    name: str, shape: tuple[int, ...], visibility: str, named: Named
) -> None:
    kernel = named(name, torch.float32)
    q, k, v = tensors(shape, torch.float32)
    sees, scale = rule(shape, visibility), 0.3
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    exact_out, exact_lse = attention_oracle(*leaves, visibility=sees, softmax_scale=scale)
    dout = torch.randn(q.shape)
    (exact_out * dout).sum().backward()

    out, lse = forward(kernel, q, k, v, visibility=sees, softmax_scale=scale)
    assert torch.equal(lse == -torch.inf, exact_lse == -torch.inf)
    torch.testing.assert_close(out.double(), exact_out, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=0)
    delta = (dout * out).sum(-1).transpose(1, 2)
    how = {"visibility": sees, "softmax_scale": scale}
    for has_dlse in (False, True):
        gradients = backward(kernel, q, k, v, dout, lse, delta, **how, has_dlse=has_dlse)
        for gradient, leaf in zip(gradients, leaves, strict=True):
            assert leaf.grad is not None
            # Scores of 256 products are near 20: their last bit in fp32 is 2e-6.
            torch.testing.assert_close(gradient.double(), leaf.grad, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize("visibility", ["none", "frames"])
def test_blocks_of_keys_add_up_to_the_whole(visibility: str) -> None:
    """The heart of every method: parts merge, and dk, dv of a block are exact given the lse."""
    shape = (2, 9, 600, 4, 2, 32)
    kernel = NativeKernel()
    q, k, v = tensors(shape, torch.float32)
    sees, dout = rule(shape, visibility), torch.randn(q.shape)
    cuts = (0, 200, 200, 597, 600)
    blocks = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    parts = [None if sees is None else sees.part(slice(None), b) for b in blocks]
    out, lse = merge(
        [
            forward(kernel, q, k[:, b], v[:, b], visibility=p, softmax_scale=0.2, partial=True)
            for b, p in zip(blocks, parts, strict=True)
        ],
        torch.float32,
    )
    whole_out, whole_lse = forward(kernel, q, k, v, visibility=sees, softmax_scale=0.2)
    torch.testing.assert_close(out, whole_out)
    torch.testing.assert_close(lse, whole_lse)
    delta = (dout * out).sum(-1).transpose(1, 2)

    def gradients(keys: slice, part: Visibility | None) -> tuple[Tensor, Tensor, Tensor]:
        how = {"visibility": part, "softmax_scale": 0.2, "has_dlse": False}
        return backward(kernel, q, k[:, keys], v[:, keys], dout, lse, delta, **how)

    pieces = [gradients(b, p) for b, p in zip(blocks, parts, strict=True)]
    whole = gradients(slice(None), sees)
    torch.testing.assert_close(sum(piece[0] for piece in pieces), whole[0])
    for index in (1, 2):
        together = torch.cat([piece[index] for piece in pieces], dim=1)
        torch.testing.assert_close(together, whole[index])


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize("visibility", ["none", "frames"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_of_few_queries_are_rounded_once(
    dtype: torch.dtype, visibility: str
) -> None:
    """By several blocks of keys, in fp32: dq is not rounded at all."""
    shape = (1, 9, 5000, 4, 2, 32)
    q, k, v = tensors(shape, dtype)
    sees = rule(shape, visibility)
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    out, lse = attention_oracle(*leaves, visibility=sees, softmax_scale=0.2)
    dout = torch.randn(q.shape).to(dtype)
    (out * dout).sum().backward()
    delta = (dout * out.detach()).sum(-1).transpose(1, 2).float()
    how = {"visibility": sees, "softmax_scale": 0.2, "has_dlse": False}
    gradients = backward(NativeKernel(), q, k, v, dout, lse.detach().float(), delta, **how)
    assert [gradient.dtype for gradient in gradients] == [torch.float32, dtype, dtype]
    half_a_step = torch.finfo(dtype).eps / 2
    for gradient, leaf, rounding in zip(
        gradients, leaves, (0.0, half_a_step, half_a_step), strict=True
    ):
        assert leaf.grad is not None
        torch.testing.assert_close(gradient.double(), leaf.grad, atol=1e-6, rtol=1.01 * rounding)


@pytest.mark.slow
@pytest.mark.parametrize(("visibility", "has_dlse"), [("none", True), ("frames", False)])
@pytest.mark.parametrize(
    ("name", "queries"), [*itertools.product(NAMES, (0, 9, 150)), ("triton", 0), ("triton", 9)]
)
def test_gradients_are_written_to_given_tensors(
    name: str,
    queries: int,
    visibility: str,
    has_dlse: bool,
    named: Named,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ds_lvx.kernels.native._CPU_SCORE_ELEMENTS", 2**16)  # several of queries
    kernel = named(name, torch.bfloat16)
    q, k, v = tensors((2, queries, 300, 4, 2, 16), torch.bfloat16)
    sees = None if visibility == "none" else rule((2, queries, 300), visibility)
    lse = torch.full((2, 4, queries), 6.0)
    arguments = {"visibility": sees, "softmax_scale": 0.3, "has_dlse": has_dlse}
    expected = backward(kernel, q, k, v, q, lse, lse, **arguments)
    whole = torch.full((2, 2, 300, 4, 16), torch.nan, dtype=torch.bfloat16)
    into = (whole[0, :, :, 1:3], whole[1, :, :, 1:3])
    found = backward(kernel, q, k, v, q, lse, lse, **arguments, into=into)
    assert found[1:] == into
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert whole[:, :, :, 0].isnan().all()
    assert whole[:, :, :, 3].isnan().all()


def test_triton_writes_them_there_itself(named: Named, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to copy, but where the last dimension is not dense."""
    kernel, made = named("triton", torch.bfloat16), []
    monkeypatch.setattr(
        "ds_lvx.kernels.triton_kernel.written",
        lambda gradients, into: (made.append(gradients), written(gradients, into))[1],
    )
    q, k, v = tensors((1, 3, 40, 2, 2, 16), torch.bfloat16)
    lse = torch.full((1, 2, 3), 4.0)
    dense, odd = (
        torch.empty(1, 40, 4, 16).bfloat16()[:, :, 1:3],
        torch.empty(1, 40, 2, 32).bfloat16(),
    )
    arguments = {"visibility": None, "softmax_scale": 0.3, "has_dlse": False}
    found = backward(kernel, q, k, v, q, lse, lse, **arguments, into=(dense, odd[..., ::2]))
    ((dk, dv),) = made
    assert dk is dense
    assert dv is not found[2]
    assert torch.equal(dv, odd[..., ::2])


@pytest.mark.usefixtures("_products")
def test_many_queries_make_no_gradients_of_all_keys_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ds_lvx.kernels.native._CPU_SCORE_ELEMENTS", 2**16)
    q, k, v = tensors((1, 150, 4000, 4, 2, 32), torch.bfloat16)
    lse = torch.full((1, 4, 150), 9.0)
    with LargestTensor(torch.float32) as largest:
        backward(
            NativeKernel(), q, k, v, q, lse, lse, visibility=None, softmax_scale=0.3, has_dlse=True
        )
    assert 0 < largest.elements < k.numel() // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("visibility", ["none", "frames"])
@pytest.mark.parametrize("name", NAMES)
def test_keys_fold_into_a_running_result(
    name: str, visibility: str, dtype: torch.dtype, named: Named
) -> None:
    shape = (2, 9, 600, 4, 2, 32)
    kernel = named(name, dtype)
    q, k, v = tensors(shape, dtype)
    sees = rule(shape, visibility)
    running = empty_part(q, torch.float32)
    for keys in (slice(0, 200), slice(200, 200), slice(200, 600)):
        part = None if sees is None else sees.part(slice(None), keys)
        fold(kernel, q, k[:, keys], v[:, keys], running, visibility=part, softmax_scale=0.2)
    exact = attention_oracle(q.double(), k.double(), v.double(), visibility=sees, softmax_scale=0.2)
    for found, expected in zip(running, exact, strict=True):
        # Inputs are exact in 16 bits, and nothing on the way is rounded to them.
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_lengths_of_zero(name: str, queries: int, keys: int, named: Named) -> None:
    kernel = named(name, torch.bfloat16)
    q, k, v = tensors((2, queries, keys, 4, 2, 16), torch.bfloat16)
    out, lse = forward(kernel, q, k, v, visibility=None, softmax_scale=1.0)
    assert out.shape == q.shape
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    dq, dk, dv = backward(
        kernel, q, k, v, q, lse, lse, visibility=None, softmax_scale=1.0, has_dlse=False
    )
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
    assert not any(gradient.isnan().any() for gradient in (dq, dk, dv))


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize("visibility", ["none", "frames"])
@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_any_layout_of_the_inputs(layout: str, visibility: str) -> None:
    """The fused kernels read a head's numbers in one go and do not check that they lie together."""
    shape = (2, 7, 40, 4, 2, 16)
    kernel, sees = NativeKernel(), rule(shape, visibility)
    q, k, v = tensors(shape, torch.float32)
    if layout == "expanded":
        k, v = (t[:1].expand_as(t) for t in (k, v))

    def lay_out(tensor: Tensor) -> Tensor:
        if layout == "strided":
            return tensor.repeat_interleave(2, dim=-1)[..., ::2]
        if layout == "transposed":
            return tensor.transpose(2, 3).contiguous().transpose(2, 3)
        return tensor

    def run(*inputs: Tensor) -> list[Tensor]:
        arguments = {"visibility": sees, "softmax_scale": 0.3}
        out, lse = forward(kernel, *inputs[:3], **arguments)
        delta = (inputs[3] * out).sum(-1).transpose(1, 2)
        rest = (inputs[3], lse, delta)
        return [out, lse, *backward(kernel, *inputs[:3], *rest, **arguments, has_dlse=False)]

    dout = torch.randn(q.shape)
    inputs = [lay_out(t) for t in (q, k, v, dout)]
    for got, wanted in zip(run(*inputs), run(q, k.clone(), v.clone(), dout), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("_products")
def test_only_one_blocks_mask_is_alive_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most = 0, 0
    original = Visibility.mask

    def ended() -> None:
        nonlocal alive
        alive -= 1

    def counted(*args: slice) -> Tensor:
        nonlocal alive, most
        mask = original(*args)  # type: ignore[arg-type]
        alive += 1
        most = max(most, alive)
        weakref.finalize(mask, ended)
        return mask

    monkeypatch.setattr(Visibility, "mask", counted)
    shape = (1, 5, 40_000, 1, 1, 8)
    q, k, v = tensors(shape, torch.float32)
    sees = rule(shape, "shuffled")
    kernel = NativeKernel()
    out, lse = forward(kernel, q, k, v, visibility=sees, softmax_scale=1.0)
    backward(kernel, q, k, v, q, lse, lse, visibility=sees, softmax_scale=1.0, has_dlse=False)
    assert out.shape == q.shape
    assert 1 <= most <= 2


@pytest.mark.usefixtures("_products")
def test_many_queries_are_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a fused kernel the scores of a block stay within a budget; gradients add up."""
    monkeypatch.setattr("ds_lvx.kernels.native._CPU_SCORE_ELEMENTS", 2**11)
    shape = (1, 50, 300, 2, 1, 8)
    q, k, v = tensors(shape, torch.float32)
    out, lse = forward(NativeKernel(), q, k, v, visibility=None, softmax_scale=0.3)
    delta = (q * out).sum(-1).transpose(1, 2)
    how = {"visibility": None, "softmax_scale": 0.3, "has_dlse": True}
    kernels = [kernel_for(name, like(torch.float32)) for name in ("native", "reference")]
    gradients = [backward(kernel, q, k, v, q, lse, delta, **how) for kernel in kernels]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("_products")
def test_a_tiny_dout_does_not_underflow() -> None:
    """delta is what travels: the out that stands in for it must not divide by a square of 1e-30."""
    shape = (1, 4, 50, 2, 2, 16)
    q, k, v = tensors(shape, torch.float32)
    kernel = NativeKernel()
    out, lse = forward(kernel, q, k, v, visibility=None, softmax_scale=0.25)
    dout = torch.randn(q.shape)

    def gradients(factor: float) -> list[Tensor]:
        delta = (factor * dout * out).sum(-1).transpose(1, 2)
        how = {"visibility": None, "softmax_scale": 0.25, "has_dlse": False}
        parts = backward(kernel, q, k, v, factor * dout, lse, delta, **how)
        return [part / factor for part in parts]

    for tiny, plain in zip(gradients(1e-25), gradients(1.0), strict=True):
        torch.testing.assert_close(tiny, plain, atol=1e-5, rtol=1e-4)


def test_choosing() -> None:
    assert (
        kernel_for("auto", like(torch.bfloat16)).name
        == kernel_for("native", like(torch.float32)).name
        == "native"
    )
    assert kernel_for("reference", like(torch.float16)).name == "reference"
    with pytest.raises(ValueError, match=r"'flash3'.*'native'"):
        kernel_for("flash3", like(torch.float32))
    with pytest.raises(ValueError, match=r"got torch.int64; expected one of torch.float32"):
        kernel_for("native", like(torch.int64))
    with pytest.raises(ValueError, match=r"'triton' for torch.float64.*use 'native'"):
        kernel_for("triton", like(torch.float64))


def test_of_queries_only_those_that_see_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two pieces of a text the early one sees nothing of the keys between them."""
    made, stand_in = [], flash.stand_in

    def noted(dout: Tensor, delta: Tensor) -> Tensor:
        made.append(dout.shape[1])
        return stand_in(dout, delta)

    monkeypatch.setattr(onednn, "serves", lambda: False)
    monkeypatch.setattr(flash, "stand_in", noted)
    q, dout = torch.randn(2, 1, 160, 2, 16).bfloat16()
    k, v = torch.randn(2, 1, 64, 2, 16).bfloat16()
    places = torch.cat((torch.arange(80), torch.arange(400, 480)))[None].int()
    sees = Visibility(torch.zeros_like(places), places + 1, torch.arange(100, 164)[None].int())
    problem, ones = Problem(q, k, v, Rule(sees), softmax_scale=0.25), torch.ones(1, 2, 160)
    dq, *_ = NativeKernel().backward(problem, Upstream(dout, ones, ones))
    assert made == [80]
    assert dq[0, :, 0, 0].ne(0).tolist() == [False] * 80 + [True] * 80
