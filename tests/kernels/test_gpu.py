"""The kernels as they run on the GPU at hand, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_lvx import Visibility
from ds_lvx.attention.oracle import attention_oracle
from ds_lvx.config.registry import KERNELS
from ds_lvx.kernels.choice import candidates, kernel_for
from ds_lvx.kernels.interface import Kernel, Problem, Upstream
from ds_lvx.kernels.merge import merge_
from ds_lvx.kernels.native import NativeKernel
from ds_lvx.kernels.rule import Rule
from tests.kernels.asking import backward, fold, forward
from tests.kernels.batches import BATCHES
from tests.kernels.test_kernels import like, rule, tensors

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SHAPES = [  # batch, queries, keys, heads, kv heads, head_dim
    (1, 1, 20_000, 32, 8, 128),
    (2, 192, 3_000, 8, 2, 128),
    (1, 700, 1_001, 14, 2, 128),
    (1, 513, 2_000, 4, 4, 64),
    (1, 150, 450, 2, 2, 256),
]
FEW = (SHAPES[1], (1, 33, 500, 6, 1, 80))  # every shape is compiled anew, a second a kernel
SCALE = 0.2


def placed(
    shape: tuple[int, ...], dtype: torch.dtype, visibility: str
) -> tuple[list[Tensor], Visibility | None]:
    """q, k, v, dout and a rule, on the device."""
    inputs = [tensor.to(DEVICE) for tensor in tensors(shape, dtype)]
    inputs.append(torch.randn_like(inputs[0]))
    sees = rule(shape, visibility)
    if sees is not None:
        sees = sees.to(torch.device(DEVICE))
    return inputs, sees


def errors(kernel: Kernel, inputs: list[Tensor], sees: Visibility | None) -> dict[str, float]:
    """Largest errors of out, lse and gradients against float64."""
    *inputs, dout = inputs
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    exact_out, exact_lse = attention_oracle(*leaves, visibility=sees, softmax_scale=SCALE)
    (exact_out * dout.double()).sum().backward()
    out, lse = forward(kernel, *inputs, visibility=sees, softmax_scale=SCALE)
    assert torch.equal(lse == -torch.inf, exact_lse == -torch.inf)
    delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    found = backward(
        kernel, *inputs, dout, lse, delta, visibility=sees, softmax_scale=SCALE, has_dlse=False
    )
    seen = lse != -torch.inf
    result = {
        "out": (out.to(inputs[0].dtype).double() - exact_out).abs().max().item(),
        "lse": (lse.double() - exact_lse)[seen].abs().max().item() if seen.any() else 0.0,
    }
    for name, gradient, leaf in zip(("dq", "dk", "dv"), found, leaves, strict=True):
        assert leaf.grad is not None
        result[name] = (gradient.double() - leaf.grad).abs().max().item()
    return result


@pytest.mark.parametrize("visibility", ["none", "frames", "shuffled", "branches"])
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_fp32_is_exact(shape: tuple[int, ...], visibility: str) -> None:
    inputs, sees = placed(shape, torch.float32, visibility)
    found = errors(kernel_for("triton", inputs[0]), inputs, sees)
    assert max(found.values()) <= 1e-4, found


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.bfloat16) for shape in SHAPES), (SHAPES[1], torch.float16)],
    ids=str,
)
def test_16_bits_are_as_exact_as_pytorchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """At most twice the error of PyTorch's fused kernel in the same dtype."""
    inputs, _ = placed(shape, dtype, "none")
    found = errors(kernel_for("triton", inputs[0]), inputs, None)
    peer = errors(NativeKernel(), inputs, None)
    for name, error in found.items():
        assert error <= 2 * peer[name] + 1e-4, (name, found, peer)


@pytest.mark.parametrize("visibility", ["frames", "shuffled", "branches"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_visibility_costs_no_exactness(shape: tuple[int, ...], visibility: str) -> None:
    """PyTorch's own computes a rule in fp32 here, so its error is not the measure."""
    inputs, sees = placed(shape, torch.bfloat16, visibility)
    found = errors(kernel_for("triton", inputs[0]), inputs, sees)
    assert max(found.values()) <= 8e-2, found


@pytest.mark.parametrize(
    ("visibility", "dtype"),
    [("none", torch.bfloat16), ("frames", torch.float32), ("branches", torch.float32)],
)
def test_five_products_are_exact(visibility: str, dtype: torch.dtype) -> None:
    inputs, sees = placed(SHAPES[1], dtype, visibility)
    found = errors(kernel_for("triton_atomic", inputs[0]), inputs, sees)
    assert max(found.values()) <= (1e-4 if dtype == torch.float32 else 8e-2), found


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_every_run_gives_the_same_bits(shape: tuple[int, ...]) -> None:
    (q, k, v, dout), sees = placed(shape, torch.bfloat16, "shuffled")
    kernel = kernel_for("triton", q)
    runs = []
    for _ in range(3):
        out, lse = forward(kernel, q, k, v, visibility=sees, softmax_scale=SCALE)
        delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)
        gradients = backward(
            kernel, q, k, v, dout, lse, delta, visibility=sees, softmax_scale=SCALE, has_dlse=False
        )
        runs.append([out, lse, *gradients])
    for first, *others in zip(*runs, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_a_part_folds_into_a_running_result() -> None:
    shape = (2, 192, 3_000, 8, 2, 128)
    (q, k, v, _), sees = placed(shape, torch.bfloat16, "frames")
    assert sees is not None
    kernel = kernel_for("triton", q)
    halves = [slice(0, 1_700), slice(1_700, 3_000)]
    first, second = ((k[:, half], v[:, half], sees.part(slice(None), half)) for half in halves)
    options = {"softmax_scale": SCALE}
    running = forward(kernel, q, *first[:2], visibility=first[2], partial=True, **options)
    expected = [tensor.clone() for tensor in running]
    merge_(
        *expected, *forward(kernel, q, *second[:2], visibility=second[2], partial=True, **options)
    )
    fold(kernel, q, *second[:2], running, visibility=second[2], **options)
    for one, other in zip(running, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_keys_beyond_2_31_numbers() -> None:
    """The last keys lie beyond what 32 bits address; only they are visible."""
    kv_heads, head_dim = 64, 256
    keys = 2**31 // (kv_heads * head_dim) + 100
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs a GPU with 40 GiB")
    k = torch.randn(1, keys, kv_heads, head_dim, dtype=torch.bfloat16, device=DEVICE)
    v = torch.randn(1, keys, kv_heads, head_dim, dtype=torch.bfloat16, device=DEVICE)
    q = torch.randn(1, 3, kv_heads, head_dim, dtype=torch.bfloat16, device=DEVICE)
    position = torch.zeros(1, keys, dtype=torch.int32, device=DEVICE)
    position[:, -50:] = 1
    start = torch.ones(1, 3, dtype=torch.int32, device=DEVICE)
    sees = Visibility(start, start + 1, position)
    kernel = kernel_for("triton", q)
    out, lse = forward(kernel, q, k, v, visibility=sees, softmax_scale=SCALE)
    few = [t[:, -50:].double() for t in (k, v)]
    exact_out, exact_lse = attention_oracle(q.double(), *few, softmax_scale=SCALE)
    torch.testing.assert_close(out.double(), exact_out, atol=2e-2, rtol=0)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-3, rtol=0)
    delta = (q.float() * out.float()).sum(-1).transpose(1, 2)
    _, dk, dv = backward(
        kernel, q, k, v, q, lse, delta, visibility=sees, softmax_scale=SCALE, has_dlse=False
    )
    for gradient in (dk, dv):
        assert not gradient[:, :-50].any()
        assert gradient[:, -50:].any(dim=(0, 2, 3)).all()


@pytest.mark.parametrize("name", sorted(BATCHES))
def test_flash_on_a_gpu_is_right(name: str) -> None:
    """Every described batch that slices make up, against float64; cuDNN where it is plain."""
    sees = BATCHES[name].sees
    if BATCHES[name].calls is None:
        return
    shape = (*sees.q_start.shape, sees.kv_pos.shape[1], 4, 2, 64)
    q, k, v = tensors(shape, torch.bfloat16)
    asked = Problem(q.double(), k.double(), v.double(), Rule(sees), softmax_scale=0.1)
    reference = KERNELS["reference"].load()()
    out, lse = reference.forward(asked)
    upstream = Upstream(q.double(), lse, (q * out).sum(-1).transpose(1, 2))
    exact = [out, *reference.backward(asked, upstream)]
    device = torch.device("cuda")
    problem = Problem(*(t.cuda() for t in (q, k, v)), Rule.on(sees, device), softmax_scale=0.1)
    given = Upstream(problem.q, lse.float().cuda(), upstream.delta.float().cuda())
    for kernel in ("flash", "cudnn") if name in ("all visible", "text only") else ("flash",):
        found = candidates(problem.q)[kernel]
        results = [found.forward(problem)[0], *found.backward(problem, given)]
        for one, other in zip(results, exact, strict=True):
            largest = float(other.abs().max()) if other.numel() else 1.0
            torch.testing.assert_close(
                one.cpu().double(), other, atol=2e-2 * max(largest, 1e-3), rtol=0, msg=kernel
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("visibility", ["none", "frames", "branches"])
def test_native_against_the_oracle(visibility: str, dtype: torch.dtype) -> None:
    shape = (2, 33, 1000, 8, 2, 64)
    q, k, v = (t.cuda() for t in tensors(shape, dtype))
    sees = rule(shape, visibility)
    if sees is not None:
        sees = sees.to(torch.device("cuda"))
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    exact_out, exact_lse = attention_oracle(*leaves, visibility=sees, softmax_scale=0.1)
    dout = torch.randn_like(q)
    (exact_out * dout).sum().backward()
    kernel = kernel_for("native", like(dtype))
    out, lse = forward(kernel, q, k, v, visibility=sees, softmax_scale=0.1)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), exact_out, atol=limit, rtol=limit)
    torch.testing.assert_close(lse.double(), exact_lse, atol=limit, rtol=limit)
    delta = (dout.float() * exact_out.float()).sum(-1).transpose(1, 2)
    gradients = backward(
        kernel, q, k, v, dout, lse, delta, visibility=sees, softmax_scale=0.1, has_dlse=False
    )
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(gradient.double(), leaf.grad, atol=limit, rtol=limit)
