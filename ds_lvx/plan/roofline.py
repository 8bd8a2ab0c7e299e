"""The least time that attention of some queries over one rank's keys can take on a card.

Operations are those of the matrix products, bytes those of every tensor read or written once. What
is left out only adds to the time: exponentials, visibility, parts of split keys, and whatever a
kernel reads or computes twice. Exponentials are no trifle at head_dim 64, where a Hopper card needs
about as long for them as for the products (FlashAttention-3, arXiv:2407.08608).

Legend: B batch, S queries, T keys, H query heads, K key/value heads, D head_dim, e bytes a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

FP32_BYTES = 4


class Rates(Protocol):
    """What a device can do; a `ds_lvx.plan.cards.Card` is one, and so are measured rates."""

    @property
    def matrix_flops(self) -> float:
        """Matrix products, operations a second."""
        ...

    @property
    def memory_bytes_per_s(self) -> float:
        """Of the device's memory."""
        ...


@dataclass(frozen=True)
class Problem:
    """Attention of some queries over the keys of one rank.

    Attributes:
        queries, keys: S and T.
        heads, kv_heads, head_dim: H, K (which divides H), D.
        batch: B.
        element_bytes: e; 2 for bf16.
        visible: share of the S x T pairs in which the query sees the key.
        seen: share of the keys that any query sees; nobody has to read the others.

    Raises:
        ValueError: a size below 1, heads that kv_heads does not divide, a share outside 0 to 1, or
            more visible than seen.
    """

    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    element_bytes: int = 2
    visible: float = 1.0
    seen: float = 1.0

    def __post_init__(self) -> None:
        names = ("queries", "keys", "heads", "kv_heads", "head_dim", "batch", "element_bytes")
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected at least 1")
        if self.heads % self.kv_heads != 0:
            raise ValueError(
                f"kv_heads: got {self.kv_heads} for {self.heads} heads; expected a divisor of heads"
            )
        if not 0.0 <= self.visible <= self.seen <= 1.0:
            raise ValueError(
                f"visible, seen: got {self.visible} and {self.seen}; expected "
                "0 <= visible <= seen <= 1"
            )


@dataclass(frozen=True)
class Work:
    """What a call has to do at least.

    Attributes:
        flops: operations of matrix products; a multiply and an add are two.
        memory_bytes: read and written.
    """

    flops: float
    memory_bytes: float


@dataclass(frozen=True)
class Floor:
    """The least time of a call.

    Attributes:
        seconds: of the resource that takes longest.
        bound: which one that is.
    """

    seconds: float
    bound: Literal["matrix", "memory"]


def forward_work(problem: Problem) -> Work:
    """``4 B S T H D`` operations (q kT, P v); q, k, v read, out and lse (fp32) written."""
    return Work(
        flops=4 * _products(problem),
        memory_bytes=2 * _rows(problem)
        + _statistics(problem)
        + 2 * problem.seen * _key_bytes(problem),
    )


def backward_work(problem: Problem) -> Work:
    """``10 B S T H D`` operations; q, k, v, dout, lse, delta read, dq, dk, dv written.

    Five products: q kT again, dout vT, PT dout, dST q, dS k. dk and dv are written for every key,
    also where nobody sees it and they are 0.
    """
    return Work(
        flops=10 * _products(problem),
        memory_bytes=3 * _rows(problem)
        + 2 * _statistics(problem)
        + 2 * (problem.seen + 1) * _key_bytes(problem),
    )


def floor(work: Work, rates: Rates) -> Floor:
    """The least time for this work: products and memory at their full rates, side by side."""
    products = work.flops / rates.matrix_flops
    memory = work.memory_bytes / rates.memory_bytes_per_s
    return Floor(products, "matrix") if products >= memory else Floor(memory, "memory")


def _products(problem: Problem) -> float:
    """Elements of the sums of one product: B S T H D, where visible."""
    pairs = problem.visible * problem.batch * problem.queries * problem.keys
    return pairs * problem.heads * problem.head_dim


def _rows(problem: Problem) -> int:
    """Bytes of q."""
    numbers = problem.batch * problem.queries * problem.heads * problem.head_dim
    return numbers * problem.element_bytes


def _key_bytes(problem: Problem) -> int:
    """Bytes of K."""
    numbers = problem.batch * problem.keys * problem.kv_heads * problem.head_dim
    return numbers * problem.element_bytes


def _statistics(problem: Problem) -> int:
    """Bytes of lse, or of delta."""
    return problem.batch * problem.queries * problem.heads * FP32_BYTES
