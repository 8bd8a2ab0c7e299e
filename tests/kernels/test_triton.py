"""The Triton kernels in Triton's interpreter, on the CPU, against the float64 oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor
from triton.runtime import interpreter

from ds_lvx import Visibility
from ds_lvx.attention.oracle import attention_oracle
from ds_lvx.kernels import native, onednn, triton_forward, triton_kernel
from ds_lvx.kernels.choice import kernel_for
from ds_lvx.kernels.interface import Problem, Upstream
from ds_lvx.kernels.merge import merge_
from ds_lvx.kernels.native import NativeKernel
from ds_lvx.kernels.rule import Rule
from ds_lvx.kernels.triton_kernel import TritonKernel
from ds_lvx.kernels.triton_tiles import splits
from tests.kernels.asking import backward, fold, forward
from tests.kernels.test_kernels import rule, tensors

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="the kernels are compiled: a GPU is there"
)

SHAPES = [  # batch, queries, keys, heads, kv heads, head_dim
    (1, 1, 1, 1, 1, 16),
    (2, 7, 300, 4, 2, 16),
    (1, 11, 500, 3, 1, 64),
    (1, 5, 300, 2, 2, 24),
    (1, 3, 40, 3, 3, 80),
    (1, 2, 70, 2, 1, 256),
    (1, 3, 40, 2, 1, 512),
    (1, 150, 20, 1, 1, 32),
]
# Every shape with a rule and split keys; what else there is, by the shapes that it matters for.
CASES = [
    *((shape, "frames", 24) for shape in SHAPES[:2]),
    pytest.param(SHAPES[2], "frames", 24, marks=pytest.mark.exhaustive),
    *((shape, "frames", 24) for shape in SHAPES[3:]),
    *((shape, "none", 1) for shape in (SHAPES[0], SHAPES[2], SHAPES[-1])),
    (SHAPES[1], "none", 24),
    (SHAPES[2], "shuffled", 1),
    *((SHAPES[2], "branches", processors) for processors in (1, 24)),
    pytest.param(SHAPES[2], "none", 24, marks=pytest.mark.exhaustive),
    pytest.param(SHAPES[1], "shuffled", 1, marks=pytest.mark.exhaustive),
]


@pytest.fixture(autouse=True)
def _bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies bf16 as the integers that it stores, and cuts where GPUs round."""
    plain = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != triton.language.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), triton.language.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    cut = interpreter.InterpreterBuilder.create_fp_trunc

    def rounded(self: Any, handle: Any, kind: Any) -> Any:
        if kind.scalar != triton.language.bfloat16:
            return cut(self, handle, kind)
        numbers = torch.from_numpy(np.ascontiguousarray(handle.data, np.float32)).bfloat16()
        bits = numbers.view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(bits, triton.language.bfloat16)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", rounded)


@pytest.fixture(params=[1, 24], ids=["one part", "several parts"])
def processors(request: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Multiprocessors: with many of them the keys are split."""
    monkeypatch.setattr(triton_kernel, "processors", lambda tensor: request.param)
    return request.param


def errors(
    kernel: Any, inputs: list[Tensor], sees: Visibility | None, scale: float
) -> dict[str, float]:
    """Largest errors of out, lse and gradients against float64."""
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    exact_out, exact_lse = attention_oracle(*leaves, visibility=sees, softmax_scale=scale)
    torch.manual_seed(1)
    dout = torch.randn(inputs[0].shape).to(inputs[0].dtype)
    (exact_out * dout.double()).sum().backward()
    out, lse = forward(kernel, *inputs, visibility=sees, softmax_scale=scale)
    assert torch.equal(lse == -torch.inf, exact_lse == -torch.inf)
    out = out.to(inputs[0].dtype)
    delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    found = backward(
        kernel, *inputs, dout, lse, delta, visibility=sees, softmax_scale=scale, has_dlse=False
    )
    seen = lse != -torch.inf
    result = {
        "out": (out.double() - exact_out).abs().max().item(),
        "lse": (lse.double() - exact_lse)[seen].abs().max().item() if seen.any() else 0.0,
    }
    for name, gradient, leaf in zip(("dq", "dk", "dv"), found, leaves, strict=True):
        assert leaf.grad is not None
        assert gradient.shape == leaf.shape
        result[name] = (gradient.double() - leaf.grad).abs().max().item()
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "visibility", "processors"), CASES, indirect=["processors"])
def test_fp32_is_exact(shape: tuple[int, ...], visibility: str, processors: int) -> None:
    scale = 0.2 if shape[-1] <= 256 else 0.05  # of scores that are as large as the others
    found = errors(TritonKernel(), tensors(shape, torch.float32), rule(shape, visibility), scale)
    assert max(found.values()) <= 2e-5, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "sees"), [(SHAPES[1], "frames"), (SHAPES[2], "none"), (SHAPES[2], "branches")]
)
def test_five_products_are_exact(shape: tuple[int, ...], sees: str) -> None:
    kernel = kernel_for("triton_atomic", torch.empty(1, 1, 1, 16))
    found = errors(kernel, tensors(shape, torch.float32), rule(shape, sees), 0.2)
    assert max(found.values()) <= 2e-5, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.bfloat16) for shape in SHAPES[1:5]),
        (SHAPES[1], torch.float16),
        *(pytest.param(each, torch.float16, marks=pytest.mark.exhaustive) for each in SHAPES[2:5]),
    ],
)
def test_16_bits_are_as_exact_as_pytorchs(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most twice the error of PyTorch's own kernel in the same dtype."""
    # Else it would be in fp32.
    monkeypatch.setattr(native, "_FEW_QUERIES", 0)
    monkeypatch.setattr(native, "_AVX512", True)
    monkeypatch.setattr(onednn, "serves", lambda: False)
    inputs, sees = tensors(shape, dtype), rule(shape, "frames")
    found = errors(TritonKernel(), inputs, sees, 0.2)
    peer = errors(NativeKernel(), inputs, sees, 0.2)
    for name, error in found.items():
        assert error <= 2 * peer[name] + 1e-5, (name, found, peer)


@pytest.mark.slow
def test_a_part_folds_into_a_running_result(processors: int) -> None:
    shape = (2, 9, 200, 4, 2, 32)
    q, k, v = tensors(shape, torch.float32)
    sees = rule(shape, "frames")
    assert sees is not None
    kernel = TritonKernel()
    halves = [slice(0, 90), slice(90, 200)]
    parts = [sees.part(slice(None), half) for half in halves]
    running = forward(
        kernel,
        q,
        k[:, halves[0]],
        v[:, halves[0]],
        visibility=parts[0],
        softmax_scale=0.2,
        partial=True,
    )
    expected = [tensor.clone() for tensor in running]
    second = k[:, halves[1]], v[:, halves[1]]
    merge_(*expected, *forward(kernel, q, *second, visibility=parts[1], softmax_scale=0.2))
    fold(kernel, q, *second, running, visibility=parts[1], softmax_scale=0.2)
    for one, other in zip(running, expected, strict=True):
        torch.testing.assert_close(one, other)
    whole, _ = attention_oracle(
        q.double(), k.double(), v.double(), visibility=sees, softmax_scale=0.2
    )
    torch.testing.assert_close(running[0].double(), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_results_are_in_fp32_whatever_the_default_is(default: torch.dtype) -> None:
    shape = (1, 3, 50, 4, 2, 16)
    sees, (q, k, v) = rule(shape, "frames"), tensors(shape, torch.float32)
    assert sees is not None
    upstream = Upstream(q, torch.full((1, 4, 3), 4.0), torch.zeros(1, 4, 3))
    problem = Problem(q, k, v, Rule(sees), softmax_scale=0.25)

    def found(kernel: TritonKernel) -> list[Tensor]:
        return [*kernel.forward(problem), *kernel.backward(problem, upstream)]

    kernels = [TritonKernel(), triton_kernel.TritonAtomicKernel()]
    exact = [found(kernel) for kernel in kernels]
    torch.set_default_dtype(default)
    try:
        again = [found(kernel) for kernel in kernels]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(again, exact)


def test_strided_keys_are_read_in_place() -> None:
    """K and V as views of one projection, and as transposes."""
    torch.manual_seed(0)
    both = torch.randn(1, 60, 2, 3, 32)
    k, v = both[:, :, 0], both[:, :, 1]
    q = torch.randn(1, 3, 5, 32).transpose(1, 2)
    found = errors(TritonKernel(), [q, k, v], None, 0.2)
    assert max(found.values()) <= 2e-5


def test_heads_lie_further_apart_than_32_bits_count() -> None:
    """Three heads of 2^30 numbers each, of which nobody touches more than is attended to."""
    shape = (1, 4, 20, 6, 3, 16)
    inputs = tensors(shape, torch.float32)
    apart = torch.empty(2**31 + 2**10, dtype=torch.float16)
    k = apart.as_strided((1, 20, 3, 16), (2**30, 16, 2**30, 1))
    k.copy_(inputs[1])
    q, v = inputs[0].half(), inputs[2].half()
    found = errors(TritonKernel(), [q, k, v], None, 0.2)
    assert max(found.values()) <= 1e-2, found


@pytest.mark.slow
@pytest.mark.parametrize(
    "processors", [pytest.param(1, marks=pytest.mark.exhaustive), 24], indirect=True
)
def test_every_run_gives_the_same_bits(processors: int) -> None:
    shape = (1, 11, 500, 3, 1, 64)
    q, k, v = tensors(shape, torch.float32)
    sees, dout = rule(shape, "shuffled"), torch.randn(q.shape)
    runs = []
    for _ in range(2):
        out, lse = forward(TritonKernel(), q, k, v, visibility=sees, softmax_scale=0.2)
        delta = (dout * out).sum(-1).transpose(1, 2)
        gradients = backward(
            TritonKernel(),
            q,
            k,
            v,
            dout,
            lse,
            delta,
            visibility=sees,
            softmax_scale=0.2,
            has_dlse=False,
        )
        runs.append([out, lse, *gradients])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0)])
def test_nothing_to_attend(queries: int, keys: int) -> None:
    q, k, v = tensors((1, queries, keys, 2, 1, 16), torch.float32)
    out, lse = forward(TritonKernel(), q, k, v, visibility=None, softmax_scale=1.0)
    assert out.shape == q.shape
    assert not out.any()
    assert (lse == -torch.inf).all()
    gradients = backward(
        TritonKernel(), q, k, v, out, lse, lse, visibility=None, softmax_scale=1.0, has_dlse=False
    )
    assert [tuple(g.shape) for g in gradients] == [tuple(t.shape) for t in (q, k, v)]
    assert not any(gradient.any() for gradient in gradients)


def test_blocks_that_nobody_sees_are_skipped() -> None:
    """Frames in order: each tile walks over its own blocks and no others."""
    queries, keys = torch.arange(256), torch.arange(4096)
    rows = [t.int()[None] for t in (queries // 64, queries // 64 + 1, keys // 1024)]
    seen = Rule(Visibility(*rows))
    lists, counts = seen.lists(rows=128, keys=64, group=2, of_keys=False)
    assert counts.tolist() == [[[16, 16]] * 4]
    for tile in range(4):
        assert lists[0, tile, :16].tolist() == list(range(16 * tile, 16 * tile + 16))
    lists, counts = seen.lists(rows=128, keys=64, group=2, of_keys=True)
    assert counts.unique().tolist() == [1]
    assert lists[0, :, 0].tolist() == [block // 16 for block in range(64)]


@pytest.mark.slow
def test_blocks_that_are_seen_wholly_are_not_masked() -> None:
    """Told something else of their keys after the lists were made, the kernels do not look."""
    shape = (1, 24, 200, 2, 1, 16)  # of two frames; the last block is cut short
    q, k, v = tensors(shape, torch.float32)
    queries, keys = torch.arange(24), torch.arange(200)
    sees = Visibility(*(t.int()[None] for t in (queries * 0, queries // 16 + 1, keys // 128)))
    dout = torch.randn(q.shape)
    asked = Problem(q, k, v, Rule(sees), softmax_scale=0.2)

    def results() -> list[Tensor]:
        out, lse = TritonKernel().forward(asked)
        delta = (dout * out).sum(-1).transpose(1, 2)
        return [out, lse, *TritonKernel().backward(asked, Upstream(dout, lse, delta))]

    first = results()
    sees.kv_pos[:, :128] = 9  # of which every query sees all
    assert all(torch.equal(one, other) for one, other in zip(first, results(), strict=True))
    sees.kv_pos[:, 128:] = 9
    assert not torch.equal(first[0], results()[0])


@pytest.mark.parametrize("blocks", [1, 7, 1000])
@pytest.mark.parametrize("programs", [1, 48, 5000])
def test_splits_fill_the_multiprocessors(blocks: int, programs: int) -> None:
    parts = splits(programs, blocks, 132)
    assert 1 <= parts <= max(blocks // 4, 1)
    if blocks == 1000 and programs < 264:
        assert programs * parts >= min(264, programs * 250)
    if programs >= 264:
        assert parts == 1


@pytest.mark.parametrize(
    ("q", "words"),
    [
        (torch.empty(1, 1, 1, 8), "head_dim 8, where it does 16 to 512"),
        (torch.empty(1, 1, 1, 64).double(), "torch.float64, where it does torch.bfloat16"),
        (torch.empty(1, 1, 1, 64), "tensors on cpu, where it needs an NVIDIA GPU"),
    ],
    ids=["head_dim", "dtype", "device"],
)
def test_what_it_cannot_do_names_those_that_can(
    q: Tensor, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "cpu" in words:
        monkeypatch.setattr(triton_forward, "forward_kernel", None)  # not an interpreted one
    able = "use 'native' or 'flash' or 'reference'"
    with pytest.raises(ValueError, match=f"got 'triton' for {words}.*{able}"):
        kernel_for("triton", q)


def test_without_triton_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_lvx.kernels.choice.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed; pip install triton"):
        kernel_for("triton", torch.empty(1, 1, 1, 64))
