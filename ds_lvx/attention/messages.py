"""What travels in an attention call: the sizes of its messages, and what a rank sends in all.

The planner's walks, the tables of README.md and docs/how-it-works.md, and the tests that hold
`ds_lvx.traffic` to its bytes all come from here.

Legend: B batch, n ranks, s queries and t keys of a rank, H query heads, K key/value heads, D
head_dim, e bytes an element. lse, delta and what is reduced are in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ds_lvx.attention.shape import AttentionShape, head_layout

FP32_BYTES = 4
INT32_BYTES = 4


@dataclass(frozen=True)
class Messages:
    """Bytes of single messages, for so many queries or keys of one rank.

    Attributes:
        shape: the call.
        factors: parts of out and dq carry an fp32 factor a row (q in bf16; see
            `ds_lvx.attention.wire`).
    """

    shape: AttentionShape
    factors: bool = False

    def queries(self, queries: float, *, backward: bool = False) -> float:
        """q on its way to other ranks' keys; in backward q, dout, lse and delta."""
        if backward:
            return 2 * self.rows(queries) + 2 * self.statistics(queries)
        return self.rows(queries)

    def part(self, queries: float, *, backward: bool = False) -> float:
        """A result on its way home: out and lse; in backward dq."""
        factors = self.shape.batch * queries * FP32_BYTES if self.factors else 0
        return self.rows(queries) + factors + (0 if backward else self.statistics(queries))

    def keys(self, keys: float) -> float:
        """K and V, or their gradients."""
        shape = self.shape
        return 2 * shape.batch * keys * shape.kv_heads * shape.head_dim * shape.element_bytes

    def rows(self, queries: float) -> float:
        """q, dout, or what is as large."""
        shape = self.shape
        return shape.batch * queries * shape.heads * shape.head_dim * shape.element_bytes

    def statistics(self, queries: float) -> float:
        """lse, or delta."""
        return self.shape.batch * queries * self.shape.heads * FP32_BYTES

    def summed(self, queries: float) -> float:
        """out or dq where they are all-reduced."""
        return self.rows(queries) / self.shape.element_bytes * FP32_BYTES

    def rule(self, method: str, schedule: str, *, queries: float, keys: float) -> float:
        """A rank's share of the rule, which a bare operator gathers once, before its forward.

        q_start and q_end of the queries where these travel, kv_pos of the keys where those do; 0 in
        a patched model, whose ranks know the rule from the batch, and without a rule.
        """
        if not self.shape.visibility or (method, schedule) == ("lvx", "replicated"):
            return 0
        ranges = 2 * queries if method in ("lvx", "ulysses") else 0
        positions = keys if method in ("ring", "ulysses") else 0
        return self.shape.batch * INT32_BYTES * (ranges + positions)


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank hands to the transport in a call, as `ds_lvx.traffic` counts them.

    Attributes:
        rule: before forward, of a bare operator with a rule.
        forward, backward: the rest.
    """

    rule: float
    forward: float
    backward: float


def bytes_sent(
    shape: AttentionShape,
    method: str,
    schedule: str = "gather",
    *,
    rank: int = 0,
    factors: bool = False,
) -> Sent:
    """What a rank sends in one call, without the agreement on the control plane.

    With equal shards ``lvx`` sends ``(n-1) s H (2 D e + 4)`` forward and ``(n-1) s H (3 D e + 8)``
    backward by either schedule that moves queries, ``ring`` ``2 (n-1) t K D e`` and twice that,
    ``ulysses`` ``(n-1)/n (2 s H + 2 t K) D e`` each way.

    Args:
        shape: the call.
        method: ``"lvx"``, ``"ring"``, ``"ulysses"`` or ``"none"``.
        schedule: of lvx.
        rank: which one; with unequal shards they differ.
        factors: see `Messages`.
    """
    n = shape.ranks
    if method == "none" or n == 1:
        return Sent(0, 0, 0)
    message = Messages(shape, factors)
    mine = {"queries": shape.q_lengths[rank], "keys": shape.kv_lengths[rank]}
    rule = (n - 1) * message.rule(method, schedule, **mine)
    passes = _PASSES[f"lvx {schedule}" if method == "lvx" else method]
    forward, backward = passes(message, rank)
    return Sent(rule, forward, backward if shape.backward else 0)


def padded(shape: AttentionShape) -> AttentionShape:
    """The call as Ulysses runs it: shards as long as the longest, heads repeated or padded."""
    repeats, padding = head_layout(shape.heads, shape.kv_heads, shape.ranks)
    return replace(
        shape,
        q_lengths=(max(shape.q_lengths),) * shape.ranks,
        kv_lengths=(max(shape.kv_lengths),) * shape.ranks,
        heads=shape.heads + padding * (shape.heads // (shape.kv_heads * repeats)),
        kv_heads=shape.kv_heads * repeats + padding,
    )


# --------------------------------------------------------------------------------------------
# Forward and backward of each method


def _lvx_gather(message: Messages, rank: int) -> tuple[float, float]:
    """A rank's own queries to everyone, the parts of all others home."""
    mine, others = _mine_and_others(message.shape.q_lengths, rank)
    n = message.shape.ranks
    forward, backward = (
        (n - 1) * message.queries(mine, backward=each) + message.part(others, backward=each)
        for each in (False, True)
    )
    return forward, backward


def _lvx_ring(message: Messages, rank: int) -> tuple[float, float]:
    """All queries are passed on but those of the rank ahead, which were with it first."""
    q_lengths = message.shape.q_lengths
    _, passed = _mine_and_others(q_lengths, (rank + 1) % message.shape.ranks)
    _, others = _mine_and_others(q_lengths, rank)
    forward, backward = (
        message.queries(passed, backward=each) + message.part(others, backward=each)
        for each in (False, True)
    )
    return forward, backward


def _lvx_replicated(message: Messages, rank: int) -> tuple[float, float]:
    """lse to everyone, and an all-reduce of out; in backward one of dq."""
    queries, n = message.shape.q_lengths[rank], message.shape.ranks
    summed = 2 * (n - 1) / n * message.summed(queries)
    return (n - 1) * message.statistics(queries) + summed, summed


def _ring(message: Messages, rank: int) -> tuple[float, float]:
    """k and v go round; in backward dk and dv of all others go home besides."""
    kv_lengths = message.shape.kv_lengths
    _, passed = _mine_and_others(kv_lengths, (rank + 1) % message.shape.ranks)
    _, others = _mine_and_others(kv_lengths, rank)
    return message.keys(passed), message.keys(passed) + message.keys(others)


def _ulysses(message: Messages, rank: int) -> tuple[float, float]:
    """All-to-alls of q, k, v and out; in backward of their gradients."""
    shape = padded(message.shape)
    message = Messages(shape)
    whole = 2 * message.rows(shape.q_lengths[rank]) + message.keys(shape.kv_lengths[rank])
    each = (shape.ranks - 1) / shape.ranks * whole
    return each, each


def _mine_and_others(lengths: tuple[int, ...], rank: int) -> tuple[int, int]:
    return lengths[rank], sum(lengths) - lengths[rank]


_PASSES: dict[str, Callable[[Messages, int], tuple[float, float]]] = {
    "lvx gather": _lvx_gather,
    "lvx ring": _lvx_ring,
    "lvx replicated": _lvx_replicated,
    "ring": _ring,
    "ulysses": _ulysses,
}
