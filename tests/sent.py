"""Bytes that a rank sends in one call of attention, exactly, for shards of any length.

What `ds_lvx.traffic` counts is held to these, and so are the tables of README.md and
docs/how-it-works.md, and the planner's walks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from ds_lvx.attention.shape import AttentionShape, Hybrid, goes_at_once
from ds_lvx.distributed.alignment import padded as aligned
from ds_lvx.plan.pieces import across, padded, subgroup
from ds_lvx.plan.walks import way_of


class Sent(NamedTuple):
    """Without the agreement on the control plane."""

    rule: float  # before forward, of a bare operator with a rule
    forward: float  # the rest
    backward: float


def bytes_sent(shape: AttentionShape, way: str, *, rank: int = 0, factors: bool = False) -> Sent:
    """By a rank, whose number matters where shards are unequal.

    ``way`` is as of `ds_lvx.plan.cost.cost`; with ``factors`` parts of out and dq carry an fp32
    factor a row, as those of q in bf16 do (`ds_lvx.attention.wire`).
    """
    if shape.ranks == 1 or way == "none":
        return Sent(0, 0, 0)
    found = way_of(way)
    rule = 0
    if shape.visibility:
        numbers = 2 * shape.q_lengths[rank] * ("q" in found.rule)
        numbers += shape.kv_lengths[rank] * ("kv" in found.rule)
        rule = (shape.ranks - 1) * 4 * shape.batch * numbers
    forward, backward = (_sent(Call(shape, each, factors), way, rank) for each in (False, True))
    return Sent(rule, forward, backward if shape.backward else 0)


class Call(NamedTuple):
    """One pass; bytes are of a query or of a key of all samples."""

    shape: AttentionShape
    backward: bool
    factors: bool

    @property
    def q(self) -> int:
        """q, dout, or what is as large."""
        return self.wide // 4 * self.shape.element_bytes

    @property
    def wide(self) -> int:
        """out or dq in fp32."""
        return 4 * self.shape.batch * self.shape.heads * self.shape.head_dim

    @property
    def lse(self) -> int:
        """lse, or delta."""
        return 4 * self.shape.batch * self.shape.heads

    @property
    def kv(self) -> int:
        """K and V, or their gradients."""
        shape = self.shape
        return 2 * shape.batch * shape.kv_heads * shape.head_dim * shape.element_bytes

    @property
    def query(self) -> list[int]:
        """What travels to other ranks' keys."""
        return [self.q, self.q, self.lse, self.lse] if self.backward else [self.q]

    @property
    def part(self) -> list[int]:
        """What comes home."""
        factor = [4 * self.shape.batch] if self.factors else []
        return [*([] if self.backward else [self.lse]), self.q, *factor]


def _sent(call: Call, way: str, rank: int) -> float:
    found = way_of(way)
    if found.hybrid is not None:
        return _hybrid(call, found.hybrid, found.inner, rank)
    return _BY_WAY[way](call, rank)


def _gather(call: Call, rank: int) -> float:
    """A rank's own queries to everyone, the parts of all others home; each row is padded."""
    lengths = call.shape.q_lengths
    copies, parts = (len(lengths) - 1) * lengths[rank], _others(lengths, rank)
    return copies * _message(call.query) + parts * _message(call.part)


def _ring_of_queries(call: Call, rank: int) -> float:
    """All queries are passed on but those of the rank ahead, which were with it first."""
    lengths = call.shape.q_lengths
    passed = _others(lengths, rank + 1)
    return passed * sum(call.query) + _others(lengths, rank) * sum(call.part)


def _replicated(call: Call, rank: int) -> float:
    """The part to everyone, or lse to everyone and an all-reduce of out; in backward one of dq."""
    queries, n = call.shape.q_lengths[rank], call.shape.ranks
    if not call.backward and goes_at_once(queries * call.wide, n):
        return (n - 1) * _message([queries * call.lse, queries * call.wide])
    gathered = 0 if call.backward else (n - 1) * queries * call.lse
    return gathered + 2 * (n - 1) / n * (queries * call.wide)


def _ring(call: Call, rank: int) -> float:
    """k and v go round; in backward dk and dv of all others go home besides."""
    lengths = call.shape.kv_lengths
    home = _others(lengths, rank) if call.backward else 0
    return call.kv * (_others(lengths, rank + 1) + home)


def _ulysses(call: Call, rank: int) -> float:
    """q, k and v as one message, and out; in backward their gradients."""
    call = call._replace(shape=padded(call.shape))
    n, queries, keys = call.shape.ranks, call.shape.q_lengths[rank], call.shape.kv_lengths[rank]
    q, k = queries * call.q / n, keys * call.kv / 2 / n
    return (n - 1) * (_message([q + 2 * k] if queries == keys else [q, k, k]) + q)


def _hybrid(call: Call, hybrid: Hybrid, inner: str, rank: int) -> float:
    """Ulysses' messages to the subgroup, and those of the other way across."""
    number, place = divmod(rank, hybrid.ulysses)
    sent: float = 0
    if hybrid.ulysses < call.shape.ranks:
        sent += _BY_WAY[inner](call._replace(shape=across(call.shape, hybrid)), number)
    if hybrid.ulysses > 1:
        sent += _ulysses(call._replace(shape=subgroup(call.shape, hybrid, number)), place)
    return sent


def _others(lengths: tuple[int, ...], rank: int) -> int:
    """Of all ranks but one."""
    return sum(lengths) - lengths[rank % len(lengths)]


def _message(tensors: Iterable[float]) -> int:
    """Bytes of tensors as one message (`ds_lvx.distributed.bundles.pack_rows`)."""
    return sum(aligned(map(int, tensors)))


_BY_WAY: dict[str, Callable[[Call, int], float]] = {
    "lvx ring": _ring_of_queries,
    "lvx gather": _gather,
    "lvx replicated": _replicated,
    "ring": _ring,
    "ulysses": _ulysses,
}
