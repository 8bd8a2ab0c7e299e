"""Forward of few queries over very many keys, in Triton.

The query heads that share a key/value head are packed into the rows of one tile, so that K and V
are read once for all of them and never repeated. Keys are split over programs: 192 queries make a
few tiles a head, and a GPU has more multiprocessors than that. The splits merge by their lse, in a
kernel of its own, which also folds the result into a running ``(out, lse)``.

Legend: B batch, S queries, T keys, H query heads, K key/value heads, G = H / K, D head_dim. A tile
has BLOCK_M of the S * G rows of a key/value head, row r = s * G + g, and meets BLOCK_N keys at a
time. Scores are in base 2: log2(e) is folded into their factor, and exp becomes exp2.

Worked example: S = 192, G = 4 make 768 rows, 6 tiles of 128; with K = 8 that is 48 programs. On 132
multiprocessors the keys are split in 6, so that 288 programs run, and 6 parts of each row merge.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of a kernel are pointers and numbers of its launch; Triton types them then.

from __future__ import annotations

import triton
import triton.language as tl

from ds_lvx.kernels.triton_tiles import ANY_ADDRESS, LENGTHS


@triton.jit
def read(at, is_row, is_dim, MASKED: tl.constexpr, ALL_DIMS: tl.constexpr):
    """A block of rows, or of columns; masked where they may end inside it, or before BLOCK_D."""
    if MASKED:
        return tl.load(at, mask=is_row & is_dim, other=0.0)
    elif ALL_DIMS:
        return tl.load(at)
    else:
        return tl.load(at, mask=is_dim, other=0.0)


@triton.jit
def outside(gap_start, gap_end, at, is_row, place, AXIS: tl.constexpr):
    """Which rows have no gap at the place of which keys; keys lie along AXIS."""
    start = tl.expand_dims(tl.load(gap_start + at, mask=is_row, other=0), AXIS)
    end = tl.expand_dims(tl.load(gap_end + at, mask=is_row, other=0), AXIS)
    return (place < start) | (end <= place)


LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=ANY_ADDRESS)
def forward_kernel(
    q,  # [B, S, H, D]
    k,  # [B, T, K, D]
    v,  # [B, T, K, D]
    out,  # [splits, B, S, H, D], fp32
    lse,  # [splits, B, H, S], fp32
    q_start,  # [B, S], or unused
    q_end,  # [B, S], or unused
    gap_start,  # [B, S], or None
    gap_end,  # [B, S], or None
    kv_pos,  # [B, T], or unused
    visible,  # [B, tiles, T / BLOCK_N]: the blocks of keys that a tile sees, or unused
    counts,  # [B, tiles]: how many these are, or unused
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
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    positions, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    is_row, is_dim = positions < seqlen_q, dims < HEAD_DIM
    at = batch * stride_qb + positions.to(tl.int64) * stride_qs + heads * stride_qh
    queries = tl.load(q + at[:, None] + dims, mask=is_row[:, None] & is_dim, other=0.0)
    blocks = tl.cdiv(seqlen_kv, BLOCK_N)
    count, whole = blocks, seqlen_kv // BLOCK_N
    if VISIBILITY:
        start = tl.load(q_start + batch * seqlen_q + positions, mask=is_row, other=0)
        end = tl.load(q_end + batch * seqlen_q + positions, mask=is_row, other=0)
        kv_pos += batch * seqlen_kv
        tile += batch * tl.num_programs(0)
        visible += tile * blocks
        count, whole = tl.load(counts + 2 * tile), tl.load(counts + 2 * tile + 1)

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
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
            k_at = k + ahead * stride_kt + (dims[:, None] + columns[None, :] * stride_kt)
            kt = read(k_at, is_key[None, :], is_dim[:, None], masked, HEAD_DIM == BLOCK_D)
            scores = tl.dot(queries, kt, input_precision=PRECISION) * scale_log2
            if masked:
                shown = is_key[None, :]
                if VISIBILITY:
                    place = tl.load(kv_pos + keys, mask=is_key, other=0)[None, :]
                    shown = shown & (start[:, None] <= place) & (place < end[:, None])
                    if gap_start is not None:
                        rule_at = batch * seqlen_q + positions
                        shown = shown & outside(gap_start, gap_end, rule_at, is_row, place, 1)
                scores = tl.where(shown, scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            finite = higher
            if masked:
                # A row that has seen nothing yet: exp2(-inf - 0) is 0, where -inf + inf were NaN.
                finite = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - finite[:, None])
            decay = tl.exp2(peak - finite)
            total = total * decay + tl.sum(weights, 1)
            v_at = v + ahead * stride_vt + (columns[:, None] * stride_vt + dims[None, :])
            values = read(v_at, is_key[:, None], is_dim[None, :], masked, HEAD_DIM == BLOCK_D)
            mixed = mixed * decay[:, None]
            mixed = tl.dot(weights.to(values.dtype), values, mixed, input_precision=PRECISION)
            peak = higher

    saw = total > 0.0
    safe = tl.where(saw, total, 1.0)
    num_heads = num_kv_heads * GROUP
    part = split.to(tl.int64) * tl.num_programs(2) // num_kv_heads + batch  # of splits x B
    out_at = (part * seqlen_q + positions) * num_heads + heads
    tl.store(
        out + out_at[:, None] * HEAD_DIM + dims,
        (mixed / safe[:, None]).to(out.dtype.element_ty),
        mask=is_row[:, None] & is_dim,
    )
    tl.store(
        lse + (part * num_heads + heads) * seqlen_q + positions,
        tl.where(saw, (peak + tl.log2(safe)) * LN_2, float("-inf")),
        mask=is_row,
    )


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=ANY_ADDRESS)
def merge_kernel(
    parts,  # [splits, B, S, H, D], fp32
    part_lses,  # [splits, B, H, S], fp32
    out,  # [B, S, H, D]; read first when FOLD
    lse,  # [B, H, S], fp32; likewise
    rows_of_all,  # B * S * H
    seqlen_q,
    num_heads,
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FOLD: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    is_row = rows < rows_of_all
    mask = is_row[:, None] & (dims < HEAD_DIM)
    head, position = rows % num_heads, rows // num_heads % seqlen_q
    lse_at = (rows // (num_heads * seqlen_q) * num_heads + head) * seqlen_q + position
    at = rows[:, None] * HEAD_DIM + dims
    total = tl.full([BLOCK_R], float("-inf"), tl.float32)
    mixed = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if FOLD:
        total = tl.load(lse + lse_at, mask=is_row, other=float("-inf"))
        mixed = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    for split in range(splits):
        offset = split * rows_of_all.to(tl.int64)
        mine = tl.load(part_lses + offset + lse_at, mask=is_row, other=float("-inf"))
        part = tl.load(parts + offset * HEAD_DIM + at, mask=mask, other=0.0)
        higher = tl.maximum(total, mine)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        old, new = tl.exp(total - finite), tl.exp(mine - finite)
        both = old + new
        safe = tl.where(both > 0.0, both, 1.0)
        mixed = mixed * (old / safe)[:, None] + part * (new / safe)[:, None]
        total = tl.where(both > 0.0, finite + tl.log(safe), float("-inf"))
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + lse_at, total, mask=is_row)
