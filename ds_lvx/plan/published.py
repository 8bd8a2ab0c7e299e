"""The published table of the paper's first model on 6 A100, and what the planner says about it.

The walks below are those of the authors' own code (github.com/uw-mad-dash/LV-XAttn), not of ours: K
and V of 32 heads instead of 8, in fp16; dk and dv added up in fp16, by an operation of their own;
in ring attention they rotate all the way round.

Source of the table: the authors' answers in the paper's public review (OpenReview, ICML 2025).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ds_lvx.attention.shape import AttentionShape
from ds_lvx.models.registry import FAMILIES
from ds_lvx.plan.cards import CARDS
from ds_lvx.plan.cluster import Cluster, Link, from_card
from ds_lvx.plan.cost import cost
from ds_lvx.plan.pieces import Pieces
from ds_lvx.plan.transfers import Timeline, Transfer

_LATENCY_S = 20e-6

WITHIN_BYTES_PER_S = 64e9
ACROSS_BYTES_PER_S = 25e9


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds of an iteration, forward and backward, on 6 GPUs."""

    text_tokens: int
    frames: int
    ring_s: float
    ring_total_s: float
    lvx_s: float
    lvx_total_s: float


TABLE = (
    Row(384, 120, 23.30, 37.54, 0.43, 14.45),
    Row(192, 120, 23.01, 37.21, 0.40, 14.40),
    Row(192, 60, 11.69, 22.92, 0.22, 11.61),
)


def cluster(*, both_ways: bool) -> Cluster:
    """6 A100 of 40 GB, 3 a node, with the links that the authors name.

    Args:
        both_ways: their 64 and 25 GB/s count both directions together, as 64 GB/s of PCIe 4.0 with
            16 lanes does; else each direction by itself.
    """
    share = 2 if both_ways else 1
    return from_card(
        CARDS["A100-40"],
        gpus=6,
        gpus_per_node=3,
        within=Link.of(WITHIN_BYTES_PER_S / share, _LATENCY_S),
        across=Link.of(ACROSS_BYTES_PER_S / share, _LATENCY_S),
    )


def compare(row: Row, on: Cluster) -> dict[str, Any]:
    """The table's line beside the prediction, for all 8 cross-attention layers."""
    llama = FAMILIES.known()[0]
    frame_tokens, layers = llama.frame_tokens, llama.cross.count
    shape = AttentionShape.even(
        queries=row.text_tokens,
        keys=row.frames * frame_tokens,
        ranks=on.gpus,
        heads=llama.cross.heads,
        kv_heads=llama.cross.kv_heads,
        head_dim=llama.cross.head_dim,
    )
    repeated = Pieces(replace(shape, kv_heads=shape.heads), on)
    ring_s, lvx_s = layers * _ring_seconds(repeated), layers * _lvx_seconds(repeated)
    speedup, published = ring_s / lvx_s, row.ring_s / row.lvx_s
    return {
        **asdict(row),
        "visual_tokens": row.frames * frame_tokens,
        "predicted_ring_s": ring_s,
        "predicted_lvx_s": lvx_s,
        "speedup": published,
        "predicted_speedup": speedup,
        "predicted_over_published": speedup / published,
        "predicted_of_ds_lvx_s": {
            "ring": layers * cost(shape, on, method="ring").seconds,
            "lvx gather": layers * cost(shape, on, method="lvx").seconds,
        },
    }


def ring_bytes(row: Row) -> float:
    """What a GPU sends in an iteration of their ring attention."""
    ranks, llama = 6, FAMILIES.known()[0]
    cross, keys = llama.cross, row.frames * llama.frame_tokens / ranks
    return cross.count * (3 * ranks - 2) * 2 * 2 * keys * cross.heads * cross.head_dim


def _ring_seconds(pieces: Pieces) -> float:
    """Forward and backward of a layer in which K and V rotate."""
    device, shape = pieces.device, (pieces.most_queries, pieces.mean_keys)
    keys = pieces.of_k_and_v(pieces.mean_keys)
    block = pieces.ranks.shift(pieces.message.keys(pieces.mean_keys))
    forward = _rotate(pieces.n, pieces.attend_s(device.partial, *shape), ahead=block)
    backward = _rotate(
        pieces.n,
        pieces.attend_s(device.backward, *shape),
        pieces.touch_s(keys, "add 16 bits"),
        ahead=block,
        back=block,
    )
    return forward + backward + 2 * pieces.touch_s(keys, "copy")


def _lvx_seconds(pieces: Pieces) -> float:
    """Forward and backward of a layer in which queries rotate."""
    device, shape = pieces.device, (pieces.mean_queries, pieces.most_keys)
    rows, shift = pieces.of_q(pieces.mean_queries), pieces.ranks.shift
    q_bytes = pieces.message.rows(pieces.mean_queries)
    lse_bytes = pieces.message.statistics(pieces.mean_queries)
    forward = _rotate(
        pieces.n,
        pieces.attend_s(device.partial, *shape),
        pieces.touch_s(rows, "merge"),
        ahead=shift(q_bytes),
        back=shift(q_bytes + lse_bytes),
    )
    backward = _rotate(
        pieces.n,
        pieces.attend_s(device.backward, *shape),
        pieces.touch_s(pieces.of_k_and_v(pieces.most_keys), "add 16 bits"),
        ahead=shift(3 * q_bytes + lse_bytes),  # q, out, dout
        back=shift(q_bytes),  # dq
    )
    return forward + backward + pieces.touch_s(rows, "delta")


def _rotate(
    ranks: int,
    kernel_s: float,
    adding_s: float = 0.0,
    *,
    ahead: Transfer,
    back: Transfer | None = None,
) -> float:
    """One pass: the next block travels under each kernel, and so does what the last one gave.

    Results rotate all the way round, one hop more than what they are made from.
    """
    timeline = Timeline()
    returning: float | None = None
    for step in range(ranks):
        following = timeline.post(ahead) if step < ranks - 1 else None
        timeline.compute(kernel_s, "kernel")
        if returning is not None:
            timeline.wait(returning)
        timeline.compute(adding_s, "other")
        if back is not None:
            returning = timeline.post(back)
        if following is not None:
            timeline.wait(following)
    if returning is not None:
        timeline.wait(returning)
    return timeline.result().seconds
