"""Triton's kernels for parts on their way, interpreted, against PyTorch's operations."""

from __future__ import annotations

import pytest
import torch
import triton
from torch import Tensor

from ds_lvx.attention import wire
from ds_lvx.kernels import flash, triton_parts
from ds_lvx.kernels.merge import merge_, merge_stacked

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="the kernels are compiled: a GPU is there"
)
SHAPES = [(1, 3, 4, 16), (2, 5, 3, 24), (1, 2, 9, 128)]  # B, S, H, D
MINE, RANKS = 1, 3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def row_views(batch: int, seqlen: int, heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Tensors to write, that lie in a message as `pack_rows` has them."""
    row = torch.zeros(seqlen, batch * heads * head_dim + 8, dtype=torch.float16)
    half = row[:, : batch * heads * head_dim].view(seqlen, batch, heads, head_dim).movedim(0, 1)
    return half, row[:, -2 * batch :].view(torch.float32).movedim(0, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_encode_writes_what_the_operations_send(shape: tuple[int, ...]) -> None:
    batch, seqlen, heads, head_dim = shape
    # A head's rows apart, as kernels return them; rows tiny, huge, zero and with what is no number.
    part = drawn(batch, heads, seqlen, head_dim).transpose(1, 2)
    sizes = torch.tensor([1.0, 1e-30, 1e30, 0.0, 1e-38])[:seqlen]
    part = part * sizes.view(1, seqlen, 1, 1)
    part[0, 0, 0, :3] = torch.tensor([torch.inf, torch.nan, -torch.inf])
    half, factor = row_views(*shape)
    triton_parts.encode(part, half, factor)
    expected_half, expected_factor = wire.encode(part, torch.bfloat16)
    torch.testing.assert_close(half, expected_half, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(factor, expected_factor)


def test_join_of_what_is_at_home_and_one_part() -> None:
    """As the ring does: the part is not copied to stand beside it."""
    shape = SHAPES[1]
    own, part = drawn(*shape), drawn(*shape, seed=1)
    lse = drawn(2, shape[0], shape[2], shape[1], seed=2)
    sent = wire.encode(part, torch.bfloat16)
    half, factor = (tensor.expand(2, *tensor.shape) for tensor in sent)
    out, total = triton_parts.join(half, factor, lse, own, 0)
    expected, expected_lse = own.clone(), lse[0].clone()
    merge_(expected, expected_lse, wire.decode(sent), lse[1])
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(total, expected_lse, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("factors", [True, False])
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_join_is_decode_and_merge(shape: tuple[int, ...], *, softmax: bool, factors: bool) -> None:
    batch, seqlen, heads, head_dim = shape
    parts = drawn(RANKS, *shape)
    lse = drawn(RANKS, batch, seqlen, heads, seed=1).transpose(2, 3)
    lse[0] = -torch.inf  # one that saw nothing; and a row that nobody saw
    lse[:, 0, 0, 0] = -torch.inf
    parts[lse.transpose(2, 3) == -torch.inf] = 0.0
    own = drawn(batch, heads, seqlen, head_dim, seed=2).transpose(1, 2)
    own[lse[MINE].transpose(1, 2) == -torch.inf] = 0.0
    sent = [wire.encode(part, torch.bfloat16) for part in parts]
    arrived = [torch.stack(each) for each in zip(*sent, strict=True)]
    arrived = arrived if factors else [parts.half()]
    whole = wire.decode(arrived).float()
    whole[MINE] = own
    expected, total = merge_stacked(whole.clone(), lse) if softmax else (whole.sum(dim=0), None)
    arrived[0][MINE] = torch.nan  # not to be read
    found = triton_parts.join(
        arrived[0], arrived[1] if factors else None, lse if softmax else None, own, MINE
    )
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=1e-6)
    if softmax:
        torch.testing.assert_close(found[1], total, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_stands_for_out_has_its_row_sums(shape: tuple[int, ...]) -> None:
    """As the operations make it, for rows large, tiny and zero, heads' rows apart."""
    batch, seqlen, heads, head_dim = shape
    dout = drawn(batch, heads, seqlen, head_dim).transpose(1, 2)
    sizes = torch.tensor([1.0, 1e-30, 1e30, 0.0, 1e-20])[:seqlen].view(1, seqlen, 1, 1)
    dout = (dout * sizes).bfloat16()
    out = drawn(*shape, seed=1).bfloat16()
    delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    found = triton_parts.stand_in(dout, delta)
    assert found.is_contiguous()
    torch.testing.assert_close(found, flash.stand_in(dout, delta), atol=1e-6, rtol=1e-2)
    sums = (dout.double() * found.double()).sum(-1).transpose(1, 2)
    scale = dout.double().norm(dim=-1).transpose(1, 2).clamp_min(1e-38)
    torch.testing.assert_close(sums / scale, delta.double() / scale, atol=2e-2, rtol=0)
    assert triton_parts.stand_in(dout[:, :0], delta[:, :, :0]).shape == (batch, 0, heads, head_dim)
