"""How long a transfer takes between the ranks of a group that lie side by side on nodes.

Legend: n ranks of the group, g of them on a node. Links inside a node are a rank's own; the link of
a node to the others is shared by its g ranks.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from ds_lvx.plan.cluster import Cluster


@dataclass(frozen=True)
class Transfer:
    """A transfer that a rank takes part in."""

    busy_s: float  # in which the link carries nothing else
    latency_s: float  # after which it has arrived besides
    sent_bytes: float  # by this rank
    messages: int  # by this rank
    drag_s: float = 0.0  # by which it slows down what the rank computes

    @property
    def seconds(self) -> float:
        """Of one that is waited for at once."""
        return self.busy_s + self.latency_s


@dataclass(frozen=True)
class Ranks:
    """The ranks of one group on a cluster; the first one is the first of its node."""

    cluster: Cluster
    size: int  # of the group
    stride: int = 1  # its ranks are so far apart; as many groups do the same at the same time

    @property
    def per_node(self) -> int:
        """Ranks of the group on one node."""
        return min(max(self.cluster.gpus_per_node // self.stride, 1), self.size)

    @property
    def beside(self) -> int:
        """Groups that share the link of a node."""
        return min(self.stride, self.cluster.gpus_per_node)

    def shift(self, nbytes: float, *, hops: int = 1, crowded: bool = False) -> Transfer:
        """Every rank sends ``nbytes`` to the one ``hops`` ahead on the ring.

        ``crowded``: another shift, to the other side, is under way at the same time.
        """
        n, g = self.size, self.per_node
        hops %= n
        leaving = 0 if n <= g else min(hops, g, n - hops)  # of a node's ranks
        busy = latency = drag = 0.0
        sides = [(self.cluster.within, 1)] if leaving < g else []
        sides += [(self.cluster.across, leaving * self.beside)] if leaving else []
        for link, sharing in sides:
            sent = sharing * nbytes
            own = link.shifts.busy_s(2 * sent) / 2 if crowded else link.shift.busy_s(sent)
            busy, latency = max(busy, own), max(latency, link.shift.latency_s)
            drag = max(drag, link.drag_s + nbytes * link.processor_s)
        return Transfer(busy, latency, nbytes, 1, drag)

    def gather(self, nbytes: float) -> Transfer:
        """An all-gather of ``nbytes`` a rank, as a ring of ``n - 1`` hops."""
        within, across = self.cluster.within.gather, self.cluster.across.gather
        others = self.size - 1
        between_nodes = -(-self.size // self.per_node) - 1
        wires = [(within, 1)] * (self.per_node > 1) + [(across, self.beside)] * (between_nodes > 0)
        busy = max((wire.busy_s(n * others * nbytes) for wire, n in wires), default=0.0)
        latency = between_nodes * across.latency_s + (others - between_nodes) * within.latency_s
        return self._to_all(busy, latency, nbytes)

    def exchange(self, nbytes: float) -> Transfer:
        """An all-to-all: every rank sends ``nbytes`` to each other one."""
        n, g = self.size, self.per_node
        within, across = self.cluster.within, self.cluster.across
        busy = within.exchange.busy_s((g - 1) * nbytes)
        latency = within.shift.latency_s + (g - 1) * within.exchange.latency_s if g > 1 else 0.0
        if n > g:
            busy = max(busy, across.exchange.busy_s(self.beside * g * (n - g) * nbytes))
            latency = max(latency, across.shift.latency_s + (n - g) * across.exchange.latency_s)
        return self._to_all(busy, latency, nbytes)

    def all_reduce(self, nbytes: float) -> Transfer:
        """A sum of ``nbytes`` over all ranks: a reduce-scatter and an all-gather, as rings."""
        part = self.gather(nbytes / self.size)
        return Transfer(2 * part.busy_s, 2 * part.latency_s, 2 * part.sent_bytes, 2 * part.messages)

    def _to_all(self, busy_s: float, latency_s: float, nbytes: float) -> Transfer:
        others = self.size - 1
        processor_s = max(self.cluster.within.processor_s, self.cluster.across.processor_s)
        drag_s = others * nbytes * processor_s
        return Transfer(busy_s, latency_s, others * nbytes, others, drag_s)


@dataclass(frozen=True)
class Pass:
    """A forward or a backward of one rank."""

    seconds: float = 0.0
    kernel_s: float = 0.0  # in attention kernels
    projection_s: float = 0.0  # in the projection of K and V, or its backward
    other_s: float = 0.0  # in merging, copying, calls
    exposed_s: float = 0.0  # waiting for the network; these four add up to ``seconds``
    wire_s: float = 0.0  # that the network is used, hidden or not
    bytes_sent: float = 0.0  # as `ds_lvx.traffic` counts them; of the rank that sends most
    messages: int = 0


class Timeline:
    """The time of one rank: what it computes, and what its link carries meanwhile."""

    def __init__(self) -> None:
        self._now_s = self._link_free_s = 0.0
        self._spent: dict[str, Any] = defaultdict(int)  # by field of `Pass`

    def compute(self, seconds: float, what: str) -> None:
        """Compute a ``"kernel"``, a ``"projection"`` or something ``"other"`` for so long."""
        self._now_s += seconds
        self._spent[f"{what}_s"] += seconds

    def post(self, transfer: Transfer) -> float:
        """Start a transfer behind those under way; when it will have arrived."""
        self._link_free_s = max(self._now_s, self._link_free_s) + transfer.busy_s
        arrives_s = self._link_free_s + transfer.latency_s
        self.compute(transfer.drag_s, "other")
        self._spent["wire_s"] += transfer.seconds
        self._spent["bytes_sent"] += transfer.sent_bytes
        self._spent["messages"] += transfer.messages
        return arrives_s

    def wait(self, arrives_s: float) -> None:
        """Wait until then."""
        self._spent["exposed_s"] += max(arrives_s - self._now_s, 0.0)
        self._now_s = max(arrives_s, self._now_s)

    def result(self) -> Pass:
        """What it came to."""
        return Pass(seconds=self._now_s, **self._spent)
