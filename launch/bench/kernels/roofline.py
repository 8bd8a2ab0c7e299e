"""The least time that attention of some queries over one rank's keys can take on a card.

Operations are those of the matrix products, bytes those of every tensor read or written once. What
is left out only adds to the time: exponentials, visibility, parts of split keys, and whatever a
kernel reads or computes twice. Exponentials are no trifle at head_dim 64, where a Hopper card needs
about as long for them as for the products (FlashAttention-3, arXiv:2407.08608).

Legend: B batch, S queries, T keys, H query heads, K key/value heads, D head_dim, e bytes a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

FP32_BYTES = 4


@dataclass(frozen=True)
class Problem:
    """Attention of some queries over the keys of one rank."""

    queries: int  # S
    keys: int  # T
    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # D
    batch: int = 1  # B
    element_bytes: int = 2  # e
    visible: float = 1.0  # share of the S x T pairs in which the query sees the key
    seen: float = 1.0  # share of the keys that any query sees; nobody has to read the others


class Work(NamedTuple):
    """Operations of matrix products (a multiply and an add are two), bytes read and written."""

    flops: float
    memory_bytes: float


class Floor(NamedTuple):
    """The least time of a call, and what takes it."""

    seconds: float
    bound: Literal["matrix", "memory"]


def forward_work(problem: Problem) -> Work:
    """``4 B S T H D`` operations (q kT, P v); q, k, v read, out and lse (fp32) written."""
    return _work(problem, operations=4, rows=2, statistics=1, written=0)


def backward_work(problem: Problem) -> Work:
    """``10 B S T H D`` operations; q, k, v, dout, lse, delta read, dq, dk, dv written.

    Five products: q kT again, dout vT, PT dout, dST q, dS k. dk and dv are written for every key,
    also where nobody sees it and they are 0.
    """
    return _work(problem, operations=10, rows=3, statistics=2, written=2)


def floor(work: Work, matrix_flops: float, memory_bytes_per_s: float) -> Floor:
    """The least time for this work: products and memory side by side, at their rates a second."""
    products, memory = work.flops / matrix_flops, work.memory_bytes / memory_bytes_per_s
    return Floor(products, "matrix") if products >= memory else Floor(memory, "memory")


def _work(p: Problem, *, operations: int, rows: int, statistics: int, written: int) -> Work:
    """``rows`` are tensors of q's size, ``statistics`` of lse's, ``written`` of K's."""
    heads = p.batch * p.queries * p.heads
    key_bytes = p.batch * p.keys * p.kv_heads * p.head_dim * p.element_bytes
    row_bytes = rows * p.head_dim * p.element_bytes + statistics * FP32_BYTES
    return Work(
        flops=operations * p.visible * heads * p.keys * p.head_dim,
        memory_bytes=heads * row_bytes + (2 * p.seen + written) * key_bytes,
    )
