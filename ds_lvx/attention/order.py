"""Rows in the order of their positions, where ranks hold them in another.

An all-to-all brings the rows of one rank behind those of another, and what pads its shard behind
each. Under zigzag, or where visual tokens stand among the text's, neighbours of the sequence are no
neighbours then, and plain causal is no longer what it was. Rows are taken in order out of what
arrives, and go back to where they were as they leave, by the copies that are made anyway.

Legend: B batch, n ranks, s rows of a rank, padding included; S rows in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_lvx.attention.shape import Hybrid
from ds_lvx.kernels.rule import Rule
from ds_lvx.kernels.transfer import to_device
from ds_lvx.kernels.visibility import Visibility

_INT32 = torch.iinfo(torch.int32)
_LAST = torch.iinfo(torch.int64).max


@dataclass(frozen=True, eq=False)
class Places:
    """Where rows in order lie in what arrives, ``[n, B, s, ...]``.

    Attributes:
        arriving: int32 ``[B * S]``, of each row in order its place in ``[n, B, s]``.
        leaving: int32 ``[n * B * s]``, of each place its row in ``[B, S]``; of padding any.
        longest: s.
    """

    arriving: Tensor
    leaving: Tensor
    longest: int

    @classmethod
    def of(cls, order: Tensor, shards: Shards, device: torch.device) -> Places:
        """The places of an order, for tensors on a device; nobody waits for the copy.

        Args:
            order: int64 ``[B, S]``, of each row its place in ``[n, s]``, on the CPU.
            shards: whose rows these are.
            device: the one that computes.
        """
        batch, longest = len(order), shards.longest
        rank, row = order // longest, order % longest
        arriving = (
            (rank * batch + torch.arange(batch, device="cpu")[:, None]) * longest + row
        ).flatten()
        leaving = torch.zeros(batch * shards.held, dtype=torch.int32, device="cpu")
        leaving[arriving] = torch.arange(len(arriving), dtype=torch.int32, device="cpu")
        return cls(to_device(arriving.int(), device), to_device(leaving, device), longest)

    @classmethod
    def of_text(
        cls, order: Tensor | None, lengths: tuple[int, ...], *, batch: int, device: torch.device
    ) -> Places | None:
        """The places of tokens in the order of their rows, what pads a row last; None: they arrive
        so.

        Args:
            order: int64 ``[B, T]`` on the CPU, where the parts of all ranks, one after the other,
                have each token, below 0 what nobody holds; None: they are in order.
            lengths: tokens of each rank.
            batch: B.
            device: the one that computes.
        """
        shards, count = Shards(lengths, max(lengths), drops=True), sum(lengths)
        at = (~shards.padding()).nonzero()[:, 0]  # in [n, s] what the parts have
        if order is None:
            return None if len(at) == shards.held else cls.of(at.expand(batch, -1), shards, device)
        # A place beyond them for what nobody holds.
        key = torch.full((batch, count + 1), _LAST, device="cpu")
        index = torch.arange(order.shape[1], device="cpu").expand_as(order)
        key.scatter_(1, torch.where(order < 0, count, order), index)
        return cls.of(at[key[:, :count].argsort(dim=1, stable=True)], shards, device)

    def take(self, arrived: Tensor) -> Tensor:
        """``[n, B, s, H, D]`` -> ``[B, S, H, D]``, dense."""
        rows = arrived.flatten(0, 2).index_select(0, self.arriving)
        return rows.unflatten(0, (arrived.shape[1], -1))

    def put(self, rows: Tensor, leaving: Tensor) -> None:
        """`take` undone: write ``[B, S, H, D]`` to ``[n, B, s, H, D]``, and anything to padding."""
        target = leaving.view(-1, *leaving.shape[3:])
        torch.index_select(rows.flatten(0, 1), 0, self.leaving, out=target)


@dataclass(frozen=True)
class Shards:
    """Rows of ranks that attend together.

    Attributes:
        lengths: of each rank, padding not counted.
        longest: s.
        drops: padding is left out, else it comes last.
    """

    lengths: tuple[int, ...]
    longest: int
    drops: bool

    @property
    def held(self) -> int:
        """Rows, padding included."""
        return len(self.lengths) * self.longest

    @property
    def kept(self) -> int:
        """S."""
        return sum(self.lengths) if self.drops else self.held

    def padding(self) -> Tensor:
        """bool ``[n * s]``."""
        return torch.cat(
            [torch.arange(self.longest, device="cpu") >= length for length in self.lengths]
        )


@dataclass(frozen=True)
class Subgroups:
    """The ranks that attend together: all under Ulysses, those of each subgroup under a hybrid.

    Attributes:
        queries, keys: the shards of each subgroup, one after the other.
        mine: which of them is this rank's.
    """

    queries: Sequence[Shards]
    keys: Sequence[Shards]
    mine: int

    @classmethod
    def one(cls, q_lengths: tuple[int, ...], kv_lengths: tuple[int, ...]) -> Subgroups:
        """All ranks in one, by their lengths; what pads their shards is left out."""
        queries = Shards(q_lengths, max(q_lengths), drops=True)
        return cls([queries], [Shards(kv_lengths, max(kv_lengths), drops=True)], mine=0)

    @classmethod
    def of(
        cls, hybrid: Hybrid, q_lengths: tuple[int, ...], kv_lengths: tuple[int, ...], *, rank: int
    ) -> Subgroups:
        """Those of a hybrid, padded as its messages between them have to be."""

        def shards(lengths: tuple[int, ...]) -> list[Shards]:
            longest, firsts = hybrid.longest(lengths), range(0, len(lengths), hybrid.ulysses)
            return [
                Shards(lengths[first : first + hybrid.ulysses], longest[first], drops=False)
                for first in firsts
            ]

        return cls(shards(q_lengths), shards(kv_lengths), mine=rank // hybrid.ulysses)

    @property
    def padded_lengths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Queries and keys of every rank of every subgroup, padding included."""
        queries = [shards.longest for shards in self.queries for _ in shards.lengths]
        return tuple(queries), tuple([each.longest for each in self.keys for _ in each.lengths])

    def in_order(self, arriving: Visibility) -> InOrder | None:
        """A rule of all rows as they arrive, brought in order.

        None where they arrive so or no order suits them, where the CPU does not know the rule, and
        for a rank alone in its subgroup, to which nothing arrives.
        """
        if len(self.queries[self.mine].lengths) == 1 or not arriving.kv_pos.is_cpu:
            return None
        found = InOrder.of(arriving, self.queries, self.keys)
        return found if found is not None and found.moves else None


@dataclass(frozen=True, eq=False)
class Arrival:
    """What ranks attend by that hold all rows of some heads.

    Attributes:
        rule: of the rows in order; None where all see all.
        queries, keys: where those are, the same object where both lie alike; None: as they arrive.
    """

    rule: Rule | None
    queries: Places | None = None
    keys: Places | None = None


@dataclass(frozen=True, eq=False)
class InOrder:
    """A rule of rows in order, and how those of each subgroup get there; None: they arrive so."""

    visibility: Visibility
    queries: Sequence[Tensor | None]
    keys: Sequence[Tensor | None]

    @classmethod
    def of(
        cls, rule: Visibility, queries: Sequence[Shards], keys: Sequence[Shards]
    ) -> InOrder | None:
        """Queries by what they see, keys by their positions.

        None where that is no order: some query sees keys before, and behind, those of another.

        Args:
            rule: of all rows as they arrive, padding included, on the CPU.
            queries, keys: the shards of each subgroup, one after the other.
        """
        if 0 in (rule.q_start.numel(), rule.kv_pos.numel()):
            return None
        sees = rule.q_start < rule.q_end
        first = rule.q_start.masked_fill(~sees, _INT32.max).amin()
        last = rule.q_end.masked_fill(~sees, _INT32.min).amax()
        seen = (rule.kv_pos >= first) & (rule.kv_pos < last)
        starts, ends, seeing = (_parts(t, queries) for t in (_behind_gaps(rule), rule.q_end, sees))
        positions, shown = (_parts(t, keys) for t in (rule.kv_pos, seen))
        try:
            rows = [*map(_order, ends, starts, seeing, queries)]
            columns = [*map(_order, positions, positions, shown, keys)]
        except _NoOrderError:
            return None
        of_queries = (_taken(_parts(each, queries), rows) for each in rule.queries)
        return cls(Visibility.of(of_queries, _taken(positions, columns)), rows, columns)

    @property
    def moves(self) -> bool:
        """Whether some row does not arrive where it belongs."""
        return any(each is not None for each in (*self.queries, *self.keys))

    def places(
        self, subgroups: Subgroups, device: torch.device
    ) -> tuple[Places | None, Places | None]:
        """Where queries and keys of this rank's subgroup are."""
        mine = subgroups.mine
        rows, columns = self.queries[mine], self.keys[mine]
        queries, keys = subgroups.queries[mine], subgroups.keys[mine]
        of_queries = None if rows is None else Places.of(rows, queries, device)
        if columns is None:
            return of_queries, None
        if rows is not None and queries == keys and torch.equal(rows, columns):
            return of_queries, of_queries
        return of_queries, Places.of(columns, keys, device)


class _NoOrderError(Exception):
    """Rows that no order suits."""


def _behind_gaps(rule: Visibility) -> Tensor:
    """int32 ``[B, S]``: where the keys up to a query's end begin; of one with a gap, behind it."""
    if rule.gap_start is None or rule.gap_end is None:
        return rule.q_start
    has_gap = rule.gaps_meet(rule.q_start, rule.q_end - 1)
    return torch.where(has_gap, rule.gap_end, rule.q_start)


def _order(values: Tensor, others: Tensor, counts: Tensor, shards: Shards) -> Tensor | None:
    """int64 ``[B, S]``: rows by ``values``, then by ``others``, both of which rise then; those that
    do not count come last, and padding behind them. None: that is how they lie.

    Args:
        values, others, counts: ``[B, n * s]``.
        shards: that these are.
    """
    padding = shards.padding()
    behind = not bool((padding[:-1] & ~padding[1:]).any())
    if shards.kept == shards.held and behind and _rise(values, others, counts):
        return None
    key = values.long() * 2**32 + (others.long() - _INT32.min)
    key = key.masked_fill(~counts, _LAST - 1).masked_fill(padding, _LAST)
    order = key.argsort(dim=1, stable=True)[:, : shards.kept]
    if not _rise(*(t.gather(1, order) for t in (values, others, counts))):
        raise _NoOrderError
    return order


def _rise(values: Tensor, others: Tensor, counts: Tensor) -> bool:
    """Whether neither falls, from a row that counts to the next one that does."""
    of_counting = (t.masked_fill(~counts, _INT32.min) for t in (values, others))
    return all(bool(((t == t.cummax(dim=1).values) | ~counts).all()) for t in of_counting)


def _parts(rows: Tensor, shards: Sequence[Shards]) -> Sequence[Tensor]:
    return rows.split([each.held for each in shards], dim=1)


def _taken(parts: Sequence[Tensor], orders: Sequence[Tensor | None]) -> Tensor:
    pairs = zip(parts, orders, strict=True)
    return torch.cat([t if order is None else t.gather(1, order) for t, order in pairs], dim=1)
