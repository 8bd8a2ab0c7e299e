"""The layout of a batch: what attention needs to know beyond q, k and v, solved once.

A batch is cut on the CPU, where every rank knows all of it: the lengths of all ranks' shards and
the whole rule of who sees what. A `Layout` holds both, on the CPU and on the device; layers take
the parts that their method needs, and find again what an earlier layer has found: blocks, lists,
method, schedule, kernel. Nothing of it is sent. A bare operator, which knows its own shard only,
makes one for its one call, and gathers what its method needs of the rule.

Legend: n ranks, s queries and t keys of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_lvx.attention.order import Arrival, Subgroups
from ds_lvx.attention.shape import Hybrid
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.subgroups import Divisions
from ds_lvx.kernels.choice import kernel_for
from ds_lvx.kernels.interface import Kernel
from ds_lvx.kernels.rule import Rule, Structure
from ds_lvx.kernels.visibility import EVERYTHING, Visibility

T = TypeVar("T")


class Layout:
    """Who holds which queries and keys of a sequence, and who sees what.

    Args:
        channel: the ranks that share the sequence.
        q_lengths, kv_lengths: queries and keys of every rank.
        rule: of the queries from ``first_query`` on over the keys from ``first_key`` on; None
            where all see all.
        first_query, first_key: places in the whole sequence.
        device: the one that computes.

    Attributes:
        elsewhere: the most keys of a rank of another group, where a projection in chunks has to run
            as often there; 0 where that does not matter.
    """

    def __init__(
        self,
        channel: Channel,
        q_lengths: tuple[int, ...],
        kv_lengths: tuple[int, ...],
        rule: Rule | None = None,
        *,
        device: torch.device,
        first_query: int = 0,
        first_key: int = 0,
    ) -> None:
        self.channel = channel
        self.q_lengths = q_lengths
        self.kv_lengths = kv_lengths
        self.device = device
        self.elsewhere = 0
        self._rule = rule
        self._first_query, self._first_key = first_query, first_key
        self._settled: dict[Hashable, Any] = {}

    @classmethod
    def of_batch(
        cls,
        channel: Channel,
        q_lengths: tuple[int, ...],
        kv_lengths: tuple[int, ...],
        visibility: Visibility | None,
        *,
        device: torch.device,
    ) -> Layout:
        """The layout of a batch that every rank knows whole.

        Args:
            channel, q_lengths, kv_lengths: as of the class.
            visibility: of all queries over all keys, ranks in order, on the CPU; nobody writes to
                it any more. None: all see all.
            device: where attention will run; nobody waits for the copy.

        Raises:
            ValueError: a rule of other lengths than those of the ranks together.
        """
        if visibility is None:
            return cls(channel, q_lengths, kv_lengths, device=device)
        found = visibility.q_start.shape[1], visibility.kv_pos.shape[1]
        if found != (sum(q_lengths), sum(kv_lengths)):
            raise ValueError(
                f"visibility: got {found[0]} queries and {found[1]} keys; expected those of all "
                f"ranks, {sum(q_lengths)} and {sum(kv_lengths)}"
            )
        return cls(channel, q_lengths, kv_lengths, Rule.on(visibility, device), device=device)

    @classmethod
    def of_call(
        cls,
        channel: Channel,
        q_lengths: tuple[int, ...],
        kv_lengths: tuple[int, ...],
        visibility: Visibility | None,
        *,
        device: torch.device,
        all_queries: bool,
        all_keys: bool,
        backward: bool = True,
    ) -> Layout:
        """The layout of a bare operator's call, from this rank's shard of the rule.

        Args:
            channel, q_lengths, kv_lengths: as of the class.
            visibility: of this rank's queries over its keys, or None.
            device: that of q.
            all_queries, all_keys: what the method needs of the other ranks' parts.
            backward: one may follow, until which a copy of ``visibility`` is kept.

        Collectives: with a rule an all-gather of ``8 (n - 1) s`` bytes a sample for the queries
        (twice as many where it has gaps), one of ``4 (n - 1) t`` for the keys.
        """
        if visibility is None:
            return cls(channel, q_lengths, kv_lengths, device=device)
        if backward:
            visibility = visibility.clone()
        ranges, position = torch.stack(visibility.queries), visibility.kv_pos
        if all_queries:
            (ranges,) = channel.gather_rows([ranges], [2], q_lengths).wait()
        if all_keys:
            (position,) = channel.gather_rows([position], [1], kv_lengths).wait()
        return cls(
            channel,
            q_lengths,
            kv_lengths,
            Rule(Visibility.of(ranges, position)),
            device=device,
            first_query=0 if all_queries else sum(q_lengths[: channel.rank]),
            first_key=0 if all_keys else sum(kv_lengths[: channel.rank]),
        )

    @property
    def structure(self) -> Structure:
        """Of the rule; ``ALL`` without one."""
        return Structure.ALL if self._rule is None else self._rule.structure

    def rule(self, *, queries: int | None, keys: int | None) -> Rule | None:
        """The rule of one rank's queries over one rank's keys; None where all see all.

        Args:
            queries, keys: of which rank; None: of all ranks, in order.
        """
        rule = self._rule
        if rule is None:
            return None

        def settle() -> Rule | None:
            rows = _span(self.q_lengths, queries, self._first_query)
            return _open(rule.part(rows, _span(self.kv_lengths, keys, self._first_key)))

        return self.settled(("rule", queries, keys), settle)

    def kernel(self, name: str, q: Tensor) -> Kernel:
        """The kernel of a name for queries like ``q``; see `ds_lvx.kernels.choice.kernel_for`."""
        kind = ("kernel", name, q.dtype, q.shape[-1], q.device)
        return self.settled(kind, lambda: kernel_for(name, q))

    def arrival(self, batch: int) -> Arrival:
        """What Ulysses attends by: all rows in order, without what pads shards.

        Rows that no order suits stay as they arrive, every rank's part as long as the longest: a
        query that is added sees nothing, and a key that is added is seen by none.

        Args:
            batch: samples.
        """

        def settle() -> Arrival:
            return self._arrive(Subgroups.one(self.q_lengths, self.kv_lengths), batch)

        return self.settled(("arrival", batch), settle)

    def across(self, hybrid: Hybrid, batch: int) -> tuple[Layout, Arrival]:
        """The layout of a hybrid's subgroups, of what the ranks of each hold together, padded; and
        what the ranks of this one attend by.

        Args:
            hybrid: what the subgroups are.
            batch: samples.

        Collectives: those of `Divisions.of`.
        """

        def settle() -> tuple[Layout, Arrival]:
            subgroups = Subgroups.of(
                hybrid, self.q_lengths, self.kv_lengths, rank=self.channel.rank
            )
            arrival = self._arrive(subgroups, batch)
            layout = Layout(
                Divisions.of(self.channel, hybrid.ulysses).across,
                hybrid.together(self.q_lengths),
                hybrid.together(self.kv_lengths),
                arrival.rule,
                device=self.device,
            )
            return layout, arrival

        return self.settled((hybrid.ulysses, batch), settle)

    def _arrive(self, subgroups: Subgroups, batch: int) -> Arrival:
        """What the ranks of this one's subgroup attend by, once their rows have arrived."""
        padded = subgroups.padded_lengths
        if padded == (self.q_lengths, self.kv_lengths):
            rule = self.rule(queries=None, keys=None)
            known = None if rule is None else rule.host
            in_order = None if known is None else subgroups.in_order(known)
            if in_order is None:
                return Arrival(rule)
        else:
            visibility = self._padded(batch, *padded)
            in_order = subgroups.in_order(visibility)
            if in_order is None:
                return Arrival(self._rule_of(visibility))
        places = in_order.places(subgroups, self.device)
        return Arrival(_open(self._rule_of(in_order.visibility)), *places)

    def _rule_of(self, visibility: Visibility) -> Rule:
        on_host = visibility.kv_pos.is_cpu
        return Rule.on(visibility, self.device) if on_host else Rule(visibility)

    def _padded(
        self, batch: int, q_longest: tuple[int, ...], kv_longest: tuple[int, ...]
    ) -> Visibility:
        """The whole rule with the part of every rank as long as this; on the CPU if it is known."""
        if self._rule is None:
            lengths = sum(self.q_lengths), sum(self.kv_lengths)
            whole = Visibility.all(batch, *lengths, device=torch.device("cpu"))
        else:
            whole = self._rule.host or self._rule.visibility
        return Visibility.of(
            (_pad_parts(each, self.q_lengths, q_longest, 0) for each in whole.queries),
            _pad_parts(whole.kv_pos, self.kv_lengths, kv_longest, EVERYTHING),
        )

    def settled(self, what: Hashable, settle: Callable[[], T]) -> T:
        """``settle()``, or what it returned for the layer that asked first."""
        if what not in self._settled:
            self._settled[what] = settle()
        found: T = self._settled[what]
        return found


def _open(rule: Rule) -> Rule | None:
    return None if rule.sees_all else rule


def _span(lengths: Sequence[int], rank: int | None, first: int) -> slice:
    """Where a rank's part lies in a rule that begins at ``first``."""
    if rank is None:
        return slice(None)
    start = sum(lengths[:rank]) - first
    return slice(start, start + lengths[rank])


def _pad_parts(whole: Tensor, lengths: Sequence[int], longest: Sequence[int], value: int) -> Tensor:
    parts = zip(whole.split(list(lengths), dim=1), lengths, longest, strict=True)
    return torch.cat([F.pad(part, (0, m - n), value=value) for part, n, m in parts], dim=1)
