"""``auto``: the planner's choice of method and schedule for the real shapes of a call.

The planner is arithmetic (`ds_lvx.plan.choose`); what it needs to know of devices and links, every
rank takes from the first rank of the group, so that all of them decide alike.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from ds_lvx.attention.shape import AttentionShape, Hybrid
from ds_lvx.config import registry
from ds_lvx.distributed.channel import Channel, ProcessGroup
from ds_lvx.plan.choose import Choice, cheapest
from ds_lvx.plan.cluster import Cluster
from ds_lvx.plan.profile import current

_logger = logging.getLogger("ds_lvx")

# Of equally fast ones the first is taken.
METHODS = tuple(
    name
    for name, entry in registry.METHODS.items()
    # Nobody has said how large subgroups shall be.
    if entry.distributed and not entry.subgroups
)


@dataclass(frozen=True)
class Wanted:
    """What a rule leaves open.

    Attributes:
        method: one of `METHODS`, or ``"auto"``.
        schedule: of lvx, or ``"auto"``.
        recompute_kv: K and V are projected again in backward, which not every method can do.
        chunked: K and V exist in chunks, which not every schedule can do.
        hybrid: the subgroups of the method ``hybrid``.
    """

    method: str = "auto"
    schedule: str = "auto"
    recompute_kv: bool = False
    chunked: bool = False
    hybrid: Hybrid | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is anything to choose."""
        if self.method == registry.AUTO:
            return True
        across = self.method if self.hybrid is None else self.hybrid.across
        return self.schedule == registry.AUTO and registry.METHODS[across].has_schedules

    @property
    def methods(self) -> tuple[str, ...]:
        """Those that may run."""
        if self.method != "auto":
            return (self.method if self.hybrid is None else self.hybrid.name,)
        able = (m for m in METHODS if registry.METHODS[m].recomputes or not self.recompute_kv)
        return tuple(able)

    @property
    def schedules(self) -> tuple[str, ...]:
        """Those of lvx that may run."""
        if self.schedule != "auto":
            return (self.schedule,)
        able = (s for s in registry.SHARDED if registry.can_chunk(s) or not self.chunked)
        return tuple(able)


class Clusters:
    """What the ranks of each group agreed on; it lives as long as the group."""

    def __init__(self) -> None:
        self._by_group: WeakKeyDictionary[ProcessGroup, Cluster] = WeakKeyDictionary()

    def of(self, channel: Channel, device: torch.device, *, over: Channel | None = None) -> Cluster:
        """The cluster of a group, as its first rank knows it.

        Args:
            channel: the group.
            device: where its tensors are.
            over: the ranks that share one answer; the group itself when None.

        Collectives: the first time, an agreement of 2 KiB on the CPU over these ranks.
        """
        group = channel.group
        if group is None or channel.size == 1:
            return current(device, 1)
        if group not in self._by_group:
            mine = current(device, channel.size).record()
            records = (channel if over is None else over).agree({"cluster": mine})
            self._by_group[group] = Cluster.of(records[0]["cluster"])
        return self._by_group[group]


CLUSTERS = Clusters()


class Notes:
    """Says once, on the first rank, that a group is larger than its inputs deserve."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def about(self, choice: Choice, shape: AttentionShape, *, name: str, rank: int) -> None:
        """Tell what was chosen, and warn where one rank alone would be faster."""
        if rank != 0:
            return
        queries, keys = sum(shape.q_lengths), sum(shape.kv_lengths)
        chosen = choice.name
        if self._first(f"{name}: {chosen}"):
            _logger.info(
                "%s: auto is %s for %d queries and %d keys; %s",
                name,
                chosen,
                queries,
                keys,
                choice.reason,
            )
        if choice.one_rank_serves_best and self._first(name):
            _logger.warning(
                "%s: %d queries and %d keys are so few that one rank alone would be faster "
                "(%.3g ms predicted, %.3g ms on %d ranks); with sequence_parallel_size 1 the "
                "ranks can take different samples instead",
                name,
                queries,
                keys,
                1e3 * choice.alone_seconds,
                1e3 * choice.seconds,
                shape.ranks,
            )

    def _first(self, text: str) -> bool:
        new = text not in self._said
        self._said.add(text)
        return new


NOTES = Notes()


def decide(wanted: Wanted, shape: AttentionShape, channel: Channel, device: torch.device) -> Choice:
    """The planner's choice for a call, in a group of more ranks than one.

    Collectives: those of `Clusters.of`.
    """
    cluster = CLUSTERS.of(channel, device)
    return cheapest(shape, cluster, methods=wanted.methods, schedules=wanted.schedules)


def explain(
    wanted: Wanted,
    cluster: Cluster,
    *,
    heads: Mapping[str, int],
    ranks: int,
    sizes: tuple[tuple[int, int], ...],
) -> str:
    """What would be chosen at some sizes, in one line for the start table.

    Args:
        wanted: what is open.
        cluster: what the choice rests on.
        heads: ``heads``, ``kv_heads`` and ``head_dim`` of the layer.
        ranks: of the group.
        sizes: pairs of queries and keys, over all ranks.
    """
    words = []
    for queries, keys in sizes:
        shape = AttentionShape.even(queries=queries, keys=keys, ranks=ranks, **heads)
        choice = cheapest(shape, cluster, methods=wanted.methods, schedules=wanted.schedules)
        alone = ", though one rank serves best" if choice.one_rank_serves_best else ""
        words.append(f"{queries:,} queries x {keys:,} keys: {choice.name}{alone}")
    return "; ".join(words)
