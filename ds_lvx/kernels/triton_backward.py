"""Backward of few queries over very many keys, in Triton: given the softmax over all ranks' keys.

Two kernels, both without atomics, so that every run gives the same bits. `keys_kernel` holds a
block of keys and walks over the rows that see it: dk and dv of the block are exact, and the heads
that share it add up in its registers. `queries_kernel` holds a tile of rows and walks over a split
of the keys; its parts of dq are added up in order.

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
    count = blocks
    if VISIBILITY:
        start = tl.load(q_start + batch * seqlen_q + positions, mask=is_row, other=0)
        end = tl.load(q_end + batch * seqlen_q + positions, mask=is_row, other=0)
        kv_pos += batch * seqlen_kv
        visible += (batch * tl.num_programs(0) + tile) * blocks
        count = tl.load(counts + batch * tl.num_programs(0) + tile)

    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k += batch * stride_kb + kv_head * stride_kh
    v += batch * stride_vb + kv_head * stride_vh
    share = tl.cdiv(count, splits)
    for index in range(split * share, tl.minimum((split + 1) * share, count)):
        block = index
        if VISIBILITY:
            block = tl.load(visible + index)
        keys = block * BLOCK_N + columns
        is_key = keys < seqlen_kv
        key_at = keys.to(tl.int64)[:, None]
        key_mask = is_key[:, None] & is_dim[None, :]
        block_k = tl.load(k + key_at * stride_kt + dims[None, :], mask=key_mask, other=0.0)
        block_v = tl.load(v + key_at * stride_vt + dims[None, :], mask=key_mask, other=0.0)
        scores = tl.dot(queries, tl.trans(block_k), input_precision=PRECISION) * scale_log2
        shown = is_key[None, :]
        if VISIBILITY:
            place = tl.load(kv_pos + keys, mask=is_key, other=0)
            shown = shown & (start[:, None] <= place[None, :]) & (place[None, :] < end[:, None])
        weights = tl.where(shown, tl.exp2(scores - norm[:, None]), 0.0)
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
    q_start,  # [B, S], or unused
    q_end,  # [B, S], or unused
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
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VISIBILITY: tl.constexpr,
    PRECISION: tl.constexpr,
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
    count = tiles
    if VISIBILITY:
        place = tl.load(kv_pos + batch * seqlen_kv + keys, mask=is_key, other=0)
        visible += (batch * tl.num_programs(0) + block) * tiles
        count = tl.load(counts + batch * tl.num_programs(0) + block)

    total_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    total_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    statistics = batch * num_kv_heads * GROUP * seqlen_q
    for index in range(count):
        tile = index
        if VISIBILITY:
            tile = tl.load(visible + index)
        rows = tile * BLOCK_M + lanes
        positions, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
        is_row = positions < seqlen_q
        row_mask = is_row[:, None] & is_dim[None, :]
        row = positions.to(tl.int64)
        row_at = batch * stride_qb + row * stride_qs + heads * stride_qh
        queries = tl.load(q + row_at[:, None] + dims[None, :], mask=row_mask, other=0.0)
        dout_at = batch * stride_ob + row * stride_os + heads * stride_oh
        gradient = tl.load(dout + dout_at[:, None] + dims[None, :], mask=row_mask, other=0.0)
        lse_at = statistics + heads * seqlen_q + positions
        norm = tl.load(lse + lse_at, mask=is_row, other=float("inf"))
        offset = tl.load(delta + lse_at, mask=is_row, other=0.0)
        scores = tl.dot(block_k, tl.trans(queries), input_precision=PRECISION) * scale_log2
        weights = tl.exp2(scores - norm[None, :])
        if VISIBILITY:
            start = tl.load(q_start + batch * seqlen_q + positions, mask=is_row, other=0)
            end = tl.load(q_end + batch * seqlen_q + positions, mask=is_row, other=0)
            shown = (start[None, :] <= place[:, None]) & (place[:, None] < end[None, :])
            weights = tl.where(shown, weights, 0.0)
        total_v = tl.dot(weights.to(gradient.dtype), gradient, total_v, input_precision=PRECISION)
        dweights = tl.dot(block_v, tl.trans(gradient), input_precision=PRECISION)
        dscores = weights * (dweights - offset[None, :])
        total_k = tl.dot(dscores.to(queries.dtype), queries, total_k, input_precision=PRECISION)

    at = ((batch * seqlen_kv + far) * num_kv_heads + kv_head) * HEAD_DIM
    tl.store(dk + at[:, None] + dims, (total_k * scale).to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + at[:, None] + dims, total_v.to(dv.dtype.element_ty), mask=mask)
