"""The least time that attention of some queries over one rank's keys can take on a card.

Operations are those of the matrix products, bytes those of every tensor read or written once. What
is left out only adds to the time: exponentials, visibility, parts of split keys, and whatever a
kernel reads or computes twice. Exponentials are no trifle at head_dim 64, where a Hopper card needs
about as long for them as for the products (FlashAttention-3, arXiv:2407.08608).

Legend: B batch, S queries, T keys, H query heads, K key/value heads, D head_dim, e bytes a number.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from ds_lvx.compare.operators.tensors import Shape

FP32_BYTES = 4


class Work(NamedTuple):
    """Operations of matrix products (a multiply and an add are two), bytes read and written."""

    flops: float
    memory_bytes: float


class Floor(NamedTuple):
    """The least time of a call, and what takes it."""

    seconds: float
    bound: Literal["matrix", "memory"]


def work(shape: Shape, direction: str, *, visible: float = 1.0, seen: float = 1.0) -> Work:
    """What a kernel does of ``"forward"`` or ``"backward"``.

    Forward: ``4 B S T H D`` operations (q kT, P v); q, k, v read, out and lse (fp32) written.
    Backward: ``10 B S T H D``, five products: q kT again, dout vT, PT dout, dST q, dS k; q, k, v,
    dout, lse, delta read, dq, dk, dv written, dk and dv for every key, also where nobody sees it
    and they are 0.

    ``visible`` is the share of the S x T pairs in which the query sees the key, ``seen`` that of
    the keys that any query sees; nobody has to read the others.
    """
    # Operations; tensors of q's size, of lse's, and of K's that are written.
    operations, rows, sums, written = (4, 2, 1, 0) if direction == "forward" else (10, 3, 2, 2)
    heads, e = shape.batch * shape.seqlen_q * shape.heads, shape.tensor_dtype.itemsize
    key_bytes = shape.batch * shape.seqlen_kv * shape.kv_heads * shape.head_dim * e
    row_bytes = rows * shape.head_dim * e + sums * FP32_BYTES
    return Work(
        flops=operations * visible * heads * shape.seqlen_kv * shape.head_dim,
        memory_bytes=heads * row_bytes + (2 * seen + written) * key_bytes,
    )


def floor(done: Work, matrix_flops: float, memory_bytes_per_s: float) -> Floor:
    """The least time for this work: products and memory side by side, at their rates a second."""
    products, memory = done.flops / matrix_flops, done.memory_bytes / memory_bytes_per_s
    return Floor(products, "matrix") if products >= memory else Floor(memory, "memory")
