"""The sizes of what travels in an attention call.

Legend: B batch, n ranks, s queries and t keys of a rank, H query heads, K key/value heads, D
head_dim, e bytes an element. lse, delta and what is reduced are in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def rule(self, parts: Sequence[str], *, queries: float, keys: float) -> float:
        """A rank's share of the rule, which a bare operator gathers once, before its forward.

        q_start and q_end of the queries (``"q"``) where these travel, kv_pos of the keys (``"kv"``)
        where those do; 0 without a rule, as in a patched model, whose ranks know it from the batch.
        """
        if not self.shape.visibility:
            return 0
        numbers = 2 * queries * ("q" in parts) + keys * ("kv" in parts)
        return self.shape.batch * INT32_BYTES * numbers


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
