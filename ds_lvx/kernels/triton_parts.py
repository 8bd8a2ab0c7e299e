"""What lies between kernels, in Triton, one launch each.

Parts of a result on their way home are encoded and joined, and what stands for out in backward is
made.

`ds_lvx.attention.wire` and `ds_lvx.kernels.merge` say what is computed, and do it by PyTorch's
operations where these kernels are not there; here the numbers are read once and written once.

Legend: n parts, B batch, S queries, H heads, D head_dim. A row is what belongs to one token of one
sample, ``[H, D]``; tensors that travel are views of a message, whose rows lie apart.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of a kernel are pointers and numbers of its launch; Triton types them then.

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_lvx.kernels.triton_tiles import ANY_ADDRESS, LENGTHS, count, padded

_NUMBERS = 1024  # of a row at a time
_ROWS = 16
# Strides of a message's rows and of what is read one by one: another text has others.
_OF_ROWS = ("stride_hb", "stride_hs", "stride_mn", "stride_mb", "stride_ms")
_OF_FACTORS = ("stride_fn", "stride_fb", "stride_fs")
_OF_LSES = ("stride_ln", "stride_lb", "stride_lh", "stride_ls")
_OF_DELTA = ("stride_db", "stride_dh", "stride_ds")
_AS_THEY_COME = (*LENGTHS, *_OF_ROWS, *_OF_FACTORS, *_OF_LSES, *_OF_DELTA)
_ONE_BY_ONE = (*ANY_ADDRESS, "factor", "factors", "lses")
_TOP = tl.constexpr(0x7F800000)  # the exponent of an fp32 number
_ONE = tl.constexpr(1 << 23)  # of it
_SMALLEST = tl.constexpr(2.0**-106)
_TINY = tl.constexpr(2.0**-126)  # the smallest normal number in fp32


@triton.jit(do_not_specialize=_AS_THEY_COME, do_not_specialize_on_alignment=_ONE_BY_ONE)
def encode_kernel(
    part,  # [B, S, H, D]
    half,  # [B, S, H, D], fp16
    factor,  # [B, S], fp32
    seqlen,
    stride_pb,
    stride_ps,
    stride_ph,
    stride_hb,
    stride_hs,
    stride_fb,
    stride_fs,
    NUMBERS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,  # a divisor of the strides of ``half``
):
    row = tl.program_id(0).to(tl.int64)
    batch, position = row // seqlen, row % seqlen
    source = part + batch * stride_pb + position * stride_ps
    target = half + batch * tl.multiple_of(stride_hb, ALIGNED)
    target += position * tl.multiple_of(stride_hs, ALIGNED)
    peaks = tl.zeros([BLOCK], tl.float32)
    for first in range(0, NUMBERS, BLOCK):
        at = first + tl.arange(0, BLOCK)
        place = at // HEAD_DIM * stride_ph + at % HEAD_DIM
        size = tl.abs(tl.load(source + place, mask=at < NUMBERS, other=0.0).to(tl.float32))
        # Not of inf and NaN, which have no place in any range.
        peaks = tl.maximum(peaks, tl.where(size < float("inf"), size, 0.0))
    peak = tl.max(peaks, 0)
    peak = tl.maximum(tl.where(peak == 0.0, 0.5, peak), _SMALLEST)
    # [2^(e - 1), 2^e) has the exponent e + 126; the scale is 2^(15 - e), the factor 2^(e - 15).
    of_factor = (peak.to(tl.int32, bitcast=True) & _TOP) - 14 * _ONE
    scale = (-of_factor + 254 * _ONE).to(tl.float32, bitcast=True)
    for first in range(0, NUMBERS, BLOCK):
        at = first + tl.arange(0, BLOCK)
        place = at // HEAD_DIM * stride_ph + at % HEAD_DIM
        value = tl.load(source + place, mask=at < NUMBERS, other=0.0).to(tl.float32)
        tl.store(target + at, (value * scale).to(tl.float16), mask=at < NUMBERS)
    back = of_factor.to(tl.float32, bitcast=True)
    tl.store(factor + batch * stride_fb + position * stride_fs, back)


@triton.jit(do_not_specialize=_AS_THEY_COME, do_not_specialize_on_alignment=_ONE_BY_ONE)
def join_kernel(
    parts,  # [n, B, S, H, D]; the one of ``mine`` is not read
    factors,  # [n, B, S], fp32
    lses,  # [n, B, H, S], fp32
    own,  # [B, S, H, D]
    out,  # [B, S, H, D]
    lse,  # [B, H, S], fp32
    rows_of_all,  # B * S * H
    seqlen,
    heads,
    mine,
    stride_mn,
    stride_mb,
    stride_ms,
    stride_fn,
    stride_fb,
    stride_fs,
    stride_ln,
    stride_lb,
    stride_lh,
    stride_ls,
    stride_ob,
    stride_os,
    stride_oh,
    SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FACTORS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    ALIGNED: tl.constexpr,  # a divisor of the strides of ``parts``
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    is_row = rows < rows_of_all
    mask = is_row[:, None] & (dims < HEAD_DIM)
    head, token = rows % heads, rows // heads
    batch, position = token // seqlen, token % seqlen
    lse_at = batch * stride_lb + head * stride_lh + position * stride_ls
    finite = tl.zeros([BLOCK_R], tl.float32)
    if SOFTMAX:
        peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
        for number in tl.static_range(SIZE):
            each = tl.load(lses + number * stride_ln + lse_at, mask=is_row, other=float("-inf"))
            peak = tl.maximum(peak, each)
        # Where nothing is seen, exp(-inf - 0) = 0 is what we want and exp(-inf + inf) is NaN.
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.zeros([BLOCK_R], tl.float32)
        for number in tl.static_range(SIZE):
            each = tl.load(lses + number * stride_ln + lse_at, mask=is_row, other=float("-inf"))
            total += tl.exp(each - peak)
        finite = peak + tl.log(tl.where(total == 0.0, 1.0, total))
        whole = tl.where(total == 0.0, float("-inf"), finite)
        tl.store(lse + (batch * heads + head) * seqlen + position, whole, mask=is_row)
    mixed = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    place = batch * tl.multiple_of(stride_mb, ALIGNED) + head * HEAD_DIM
    place += position * tl.multiple_of(stride_ms, ALIGNED)
    apart = tl.multiple_of(stride_mn, ALIGNED).to(tl.int64)
    own_at = batch * stride_ob + position * stride_os + head * stride_oh
    for number in tl.static_range(SIZE):
        if number == mine:
            part = tl.load(own + own_at[:, None] + dims, mask=mask, other=0.0).to(tl.float32)
        else:
            at = number * apart + place
            part = tl.load(parts + at[:, None] + dims, mask=mask, other=0.0).to(tl.float32)
            if FACTORS:
                factor_at = number * stride_fn + batch * stride_fb + position * stride_fs
                part = part * tl.load(factors + factor_at, mask=is_row, other=0.0)[:, None]
        if SOFTMAX:
            each = tl.load(lses + number * stride_ln + lse_at, mask=is_row, other=float("-inf"))
            part = part * tl.exp(each - finite)[:, None]
        mixed += part
    tl.store(out + rows[:, None] * HEAD_DIM + dims, mixed, mask=mask)


@triton.jit(do_not_specialize=_AS_THEY_COME, do_not_specialize_on_alignment=_ONE_BY_ONE)
def stand_in_kernel(
    dout,  # [B, S, H, D]
    delta,  # [B, H, S], fp32
    out,  # [B, S, H, D], dense
    rows_of_all,  # B * S * H
    seqlen,
    heads,
    stride_ob,
    stride_os,
    stride_oh,
    stride_db,
    stride_dh,
    stride_ds,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    is_row = rows < rows_of_all
    mask = is_row[:, None] & (dims < HEAD_DIM)
    head, token = rows % heads, rows // heads
    batch, position = token // seqlen, token % seqlen
    at = batch * stride_ob + position * stride_os + head * stride_oh
    gradient = tl.load(dout + at[:, None] + dims, mask=mask, other=0.0).to(tl.float32)
    wanted = tl.load(
        delta + batch * stride_db + head * stride_dh + position * stride_ds, mask=is_row, other=0.0
    )
    largest = tl.maximum(tl.max(tl.abs(gradient), 1), _TINY)
    unit = gradient / largest[:, None]
    squares = tl.maximum(tl.sum(unit * unit, 1), 1.0)  # at least 1 unless dout is 0
    length = wanted.to(tl.float32) / largest / squares
    made = unit * length[:, None]
    tl.store(out + rows[:, None] * HEAD_DIM + dims, made.to(out.dtype.element_ty), mask=mask)


def stand_in(dout: Tensor, delta: Tensor) -> Tensor:
    """See `ds_lvx.kernels.flash.stand_in`.

    Args:
        dout: ``[B, S, H, D]``.
        delta: ``[B, H, S]``.

    Returns:
        Like dout, dense.
    """
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    batch, seqlen, heads, head_dim = dout.shape
    out = torch.empty(dout.shape, dtype=dout.dtype, device=dout.device)
    rows = batch * seqlen * heads
    if rows:
        stand_in_kernel[(count(rows, _ROWS),)](
            dout,
            delta,
            out,
            rows,
            seqlen,
            heads,
            *dout.stride()[:3],
            *delta.stride(),
            HEAD_DIM=head_dim,
            BLOCK_D=padded(head_dim),
            BLOCK_R=_ROWS,
        )
    return out


def encode(part: Tensor, half: Tensor, factor: Tensor) -> None:
    """Write a part as `ds_lvx.attention.wire` sends it for q in bf16.

    Args:
        part: fp32 or 16 bits ``[B, S, H, D]``.
        half: fp16, the same shape, written; its rows are dense.
        factor: fp32 ``[B, S]``, written.
    """
    part = part if part.stride(-1) == 1 else part.contiguous()
    batch, seqlen, heads, head_dim = part.shape
    if part.numel() == 0:
        return
    encode_kernel[(batch * seqlen,)](
        part,
        half,
        factor,
        seqlen,
        *part.stride()[:3],
        *half.stride()[:2],
        *factor.stride(),
        NUMBERS=heads * head_dim,
        HEAD_DIM=head_dim,
        BLOCK=min(_NUMBERS, padded(heads * head_dim)),
        ALIGNED=_aligned(half),
    )


def join(
    parts: Tensor, factors: Tensor | None, lses: Tensor | None, own: Tensor, mine: int
) -> tuple[Tensor, Tensor | None]:
    """Parts over disjoint keys together: merged by their lse, or without one added up.

    Args:
        parts: ``[n, B, S, H, D]``, as they travelled; rows are dense.
        factors: fp32 ``[n, B, S]``, where they were scaled.
        lses: fp32 ``[n, B, H, S]``.
        own: ``[B, S, H, D]``, this rank's part, which did not travel.
        mine: its place among the n.

    Returns:
        fp32 ``[B, S, H, D]``; and fp32 ``[B, H, S]`` where there are ``lses``.
    """
    own = own if own.stride(-1) == 1 else own.contiguous()
    batch, seqlen, heads, head_dim = own.shape
    out = torch.empty(own.shape, dtype=torch.float32, device=own.device)
    lse = None if lses is None else out.new_empty(batch, heads, seqlen)
    if own.numel() == 0:
        return out, lse
    join_kernel[(count(batch * seqlen * heads, _ROWS),)](
        parts,
        parts if factors is None else factors,
        parts if lses is None else lses,
        own,
        out,
        out if lse is None else lse,
        batch * seqlen * heads,
        seqlen,
        heads,
        mine,
        *parts.stride()[:3],
        *((0, 0, 0) if factors is None else factors.stride()),
        *((0, 0, 0, 0) if lses is None else lses.stride()),
        *own.stride()[:3],
        SIZE=len(parts),
        HEAD_DIM=head_dim,
        BLOCK_D=padded(head_dim),
        BLOCK_R=_ROWS,
        FACTORS=factors is not None,
        SOFTMAX=lses is not None,
        ALIGNED=_aligned(parts),
    )
    return out, lse


def _aligned(tensor: Tensor) -> int:
    """The power of two that divides all strides but the last two, of 16 bytes at most.

    Rows of a message begin at multiples of 16 bytes (`ds_lvx.distributed.alignment`), and are read
    and written so many at once; Triton itself looks for multiples of 16 numbers.
    """
    return math.gcd(16 // tensor.element_size(), *tensor.stride()[:-2])
