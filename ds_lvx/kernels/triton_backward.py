"""Backward of few queries over very many keys, in Triton: given the softmax over all ranks' keys.

Two kernels, both without atomics, so that every run gives the same bits. `keys_kernel` holds a
block of keys and walks over the rows that see it: dk and dv of the block are exact, and the heads
that share it add up in its registers. `queries_kernel` holds a tile of rows and walks over a split
of the keys; its parts of dq are added up in order. With ATOMIC `keys_kernel` adds up dq, too, in
any order, and does in five products what the two do in seven.

    P  = exp2(S - lse)        S = scale q kT in base 2
    dv = PT dout              dP = dout vT
    dS = P (dP - delta)       dk = scale dST q        dq = scale dS k

Legend and tiles as in `ds_lvx.kernels.triton_forward`. lse comes in base 2, with +inf for a row
that saw nothing: its weights are then exp2(-inf) = 0.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of a kernel are pointers and numbers of its launch; Triton types them then.

from __future__ import annotations

import triton
import triton.language as tl

from ds_lvx.kernels.triton_forward import outside, read
from ds_lvx.kernels.triton_tiles import ANY_ADDRESS, LENGTHS


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=ANY_ADDRESS)
def queries_kernel(
    q,  # [B, S, H, D]
    k,  # [B, T, K, D]
    v,  # [B, T, K, D]
    dout,  # [B, S, H, D]
    lse,  # [B, H, S], fp32, base 2
    delta,  # [B, H, S], fp32
    dq,  # [splits, B, S, H, D], fp32
    q_start,  # [B, S], or unused
    q_end,  # [B, S], or unused
    gap_start,  # [B, S], or None
    gap_end,  # [B, S], or None
    kv_pos,  # [B, T], or unused
    visible,  # [B, tiles, T / BLOCK_N]: the blocks of keys that a tile sees, or unused
    counts,  # [B, tiles]: how many these are, or unused
    scale,
    scale_log2,
    seqlen_q,
    seqlen_kv,
    num_kv_heads,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_ob,
    stride_os,
    stride_oh,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VISIBILITY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch = (tl.program_id(2) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(2) % num_kv_heads).to(tl.int64)
    num_heads = num_kv_heads * GROUP
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    positions, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    dims, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    is_row, is_dim = positions < seqlen_q, dims < HEAD_DIM
    far = positions.to(tl.int64)
    mask = is_row[:, None] & is_dim
    at = batch * stride_qb + far * stride_qs + heads * stride_qh
    queries = tl.load(q + at[:, None] + dims, mask=mask, other=0.0)
    at = batch * stride_ob + far * stride_os + heads * stride_oh
    gradient = tl.load(dout + at[:, None] + dims, mask=mask, other=0.0)
    at = (batch * num_heads + heads) * seqlen_q + positions
    norm = tl.load(lse + at, mask=is_row, other=float("inf"))
    offset = tl.load(delta + at, mask=is_row, other=0.0)
    blocks = tl.cdiv(seqlen_kv, BLOCK_N)
    count, whole = blocks, seqlen_kv // BLOCK_N
    if VISIBILITY:
        start = tl.load(q_start + batch * seqlen_q + positions, mask=is_row, other=0)
        end = tl.load(q_end + batch * seqlen_q + positions, mask=is_row, other=0)
        kv_pos += batch * seqlen_kv
        tile += batch * tl.num_programs(0)
        visible += tile * blocks
        count, whole = tl.load(counts + 2 * tile), tl.load(counts + 2 * tile + 1)

    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k += batch * stride_kb + kv_head * stride_kh
    v += batch * stride_vb + kv_head * stride_vh
    share = tl.cdiv(count, splits)
    first, last = split * share, tl.minimum((split + 1) * share, count)
    middle = tl.minimum(tl.maximum(first, whole), last)
    for masked in tl.static_range(2):  # blocks that are seen wholly, then the others
        low, high = first, middle
        if masked:
            low, high = middle, last
        for index in range(low, high):
            block = index
            if VISIBILITY:
                block = tl.load(visible + index)
            keys = block * BLOCK_N + columns
            is_key = keys < seqlen_kv
            ahead = tl.cast(block, tl.int64) * BLOCK_N
            k_at = k + ahead * stride_kt + (columns[:, None] * stride_kt + dims[None, :])
            block_k = read(k_at, is_key[:, None], is_dim[None, :], masked, HEAD_DIM == BLOCK_D)
            v_at = v + ahead * stride_vt + (columns[:, None] * stride_vt + dims[None, :])
            block_v = read(v_at, is_key[:, None], is_dim[None, :], masked, HEAD_DIM == BLOCK_D)
            scores = tl.dot(queries, tl.trans(block_k), input_precision=PRECISION) * scale_log2
            weights = tl.exp2(scores - norm[:, None])
            if masked:
                shown = is_key[None, :]
                if VISIBILITY:
                    place = tl.load(kv_pos + keys, mask=is_key, other=0)[None, :]
                    shown = shown & (start[:, None] <= place) & (place < end[:, None])
                    if gap_start is not None:
                        rule_at = batch * seqlen_q + positions
                        shown = shown & outside(gap_start, gap_end, rule_at, is_row, place, 1)
                weights = tl.where(shown, weights, 0.0)
            dweights = tl.dot(gradient, tl.trans(block_v), input_precision=PRECISION)
            dscores = weights * (dweights - offset[:, None])
            total = tl.dot(dscores.to(block_k.dtype), block_k, total, input_precision=PRECISION)

    part = split.to(tl.int64) * tl.num_programs(2) // num_kv_heads + batch  # of splits x B
    at = (part * seqlen_q + positions) * num_heads + heads
    tl.store(dq + at[:, None] * HEAD_DIM + dims, total * scale, mask=mask)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=ANY_ADDRESS)
def keys_kernel(
    q,  # [B, S, H, D]
    k,  # [B, T, K, D]
    v,  # [B, T, K, D]
    dout,  # [B, S, H, D]
    lse,  # [B, H, S], fp32, base 2
    delta,  # [B, H, S], fp32
    dk,  # [B, T, K, D]
    dv,  # [B, T, K, D]
    dq,  # [B, S, H, D], fp32, added to; or unused
    q_start,  # [B, S], or unused
    q_end,  # [B, S], or unused
    gap_start,  # [B, S], or None
    gap_end,  # [B, S], or None
    kv_pos,  # [B, T], or unused
    visible,  # [B, T / BLOCK_N, tiles]: the tiles that see a block of keys, or unused
    counts,  # [B, T / BLOCK_N]: how many these are, or unused
    scale,
    scale_log2,
    seqlen_q,
    seqlen_kv,
    num_kv_heads,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_ob,
    stride_os,
    stride_oh,
    stride_dkb,
    stride_dkt,
    stride_dkh,
    stride_dvb,
    stride_dvt,
    stride_dvh,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VISIBILITY: tl.constexpr,
    PRECISION: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    block = tl.program_id(0)
    batch = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % num_kv_heads).to(tl.int64)
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    dims, lanes = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    is_key, is_dim = keys < seqlen_kv, dims < HEAD_DIM
    far = keys.to(tl.int64)
    mask = is_key[:, None] & is_dim
    at = batch * stride_kb + far * stride_kt + kv_head * stride_kh
    block_k = tl.load(k + at[:, None] + dims, mask=mask, other=0.0)
    at = batch * stride_vb + far * stride_vt + kv_head * stride_vh
    block_v = tl.load(v + at[:, None] + dims, mask=mask, other=0.0)
    tiles = tl.cdiv(seqlen_q * GROUP, BLOCK_M)
    count, whole = tiles, seqlen_q * GROUP // BLOCK_M
    if VISIBILITY:
        place = tl.load(kv_pos + batch * seqlen_kv + keys, mask=is_key, other=0)
        block += batch * tl.num_programs(0)
        visible += block * tiles
        count, whole = tl.load(counts + 2 * block), tl.load(counts + 2 * block + 1)

    total_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    total_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    q += batch * stride_qb + kv_head * GROUP * stride_qh
    dout += batch * stride_ob + kv_head * GROUP * stride_oh
    dq += (batch * seqlen_q * num_kv_heads + kv_head) * GROUP * HEAD_DIM
    lse += (batch * num_kv_heads + kv_head) * GROUP * seqlen_q
    delta += (batch * num_kv_heads + kv_head) * GROUP * seqlen_q
    for masked in tl.static_range(2):  # tiles that see the block wholly, then the others
        low, high = 0, whole
        if masked:
            low, high = whole, count
        for index in range(low, high):
            tile = index
            if VISIBILITY:
                tile = tl.load(visible + index)
            rows = tile * BLOCK_M + lanes
            positions, member = rows // GROUP, (rows % GROUP).to(tl.int64)
            is_row = positions < seqlen_q
            row = positions.to(tl.int64)
            q_at = q + (row * stride_qs + member * stride_qh)[:, None] + dims[None, :]
            queries = read(q_at, is_row[:, None], is_dim[None, :], masked, HEAD_DIM == BLOCK_D)
            dout_at = dout + (row * stride_os + member * stride_oh)[:, None] + dims[None, :]
            gradient = read(dout_at, is_row[:, None], is_dim[None, :], masked, HEAD_DIM == BLOCK_D)
            lse_at = member * seqlen_q + positions
            norm = tl.load(lse + lse_at, mask=is_row, other=float("inf"))
            offset = tl.load(delta + lse_at, mask=is_row, other=0.0)
            scores = tl.dot(block_k, tl.trans(queries), input_precision=PRECISION) * scale_log2
            weights = tl.exp2(scores - norm[None, :])
            if masked and VISIBILITY:
                start = tl.load(q_start + batch * seqlen_q + positions, mask=is_row, other=0)
                end = tl.load(q_end + batch * seqlen_q + positions, mask=is_row, other=0)
                shown = (start[None, :] <= place[:, None]) & (place[:, None] < end[None, :])
                if gap_start is not None:
                    rule_at = batch * seqlen_q + positions
                    shown = shown & outside(gap_start, gap_end, rule_at, is_row, place[:, None], 0)
                weights = tl.where(shown, weights, 0.0)
            total_v = tl.dot(
                weights.to(gradient.dtype), gradient, total_v, input_precision=PRECISION
            )
            dweights = tl.dot(block_v, tl.trans(gradient), input_precision=PRECISION)
            dscores = (weights * (dweights - offset[None, :])).to(queries.dtype)
            total_k = tl.dot(dscores, queries, total_k, input_precision=PRECISION)
            if ATOMIC:
                part = tl.dot(tl.trans(dscores), block_k, input_precision=PRECISION) * scale
                dq_at = (
                    dq + (row * num_kv_heads * GROUP + member)[:, None] * HEAD_DIM + dims[None, :]
                )
                tl.atomic_add(dq_at, part, mask=is_row[:, None] & is_dim[None, :], sem="relaxed")

    at = batch * stride_dkb + far * stride_dkt + kv_head * stride_dkh
    tl.store(dk + at[:, None] + dims, (total_k * scale).to(dk.dtype.element_ty), mask=mask)
    at = batch * stride_dvb + far * stride_dvt + kv_head * stride_dvh
    tl.store(dv + at[:, None] + dims, total_v.to(dv.dtype.element_ty), mask=mask)
