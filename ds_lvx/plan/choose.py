"""Which method and schedule the planner takes for an attention call.

Pure and deterministic: the same shape and the same cluster give the same answer on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ds_lvx.attention.shape import AttentionShape
from ds_lvx.plan.cluster import Cluster
from ds_lvx.plan.cost import Cost, cost, obstacle
from ds_lvx.plan.units import duration
from ds_lvx.plan.walks import label


@dataclass(frozen=True)
class Choice:
    """What runs, and why."""

    method: str  # ``"lvx"``, ``"ring"``, ``"ulysses"`` or one like ``"hybrid 4 lvx"``
    schedule: str  # of lvx; ``"gather"``, without a meaning, for the others
    seconds: float  # predicted, forward and backward
    reason: str  # one line for a person
    alone_seconds: float  # the same call on one rank, without any transfer

    @property
    def name(self) -> str:
        """``"lvx ring"``, ``"ulysses"``."""
        return label(self.method, self.schedule)

    @property
    def one_rank_serves_best(self) -> bool:
        """Whether the input is so small that splitting it over ranks costs time."""
        return self.alone_seconds < self.seconds


@lru_cache(maxsize=1024)
def cheapest(
    shape: AttentionShape,
    cluster: Cluster,
    *,
    methods: tuple[str, ...] = ("lvx", "ring", "ulysses"),
    schedules: tuple[str, ...] = ("ring", "gather"),
) -> Choice:
    """The fastest method and schedule of those allowed for a call, as predicted.

    Of equally fast ones the first is taken. Every rank must use the same cluster, see
    `ds_lvx.plan.profile.current`.

    Raises:
        ValueError: none of the methods can run this call; says why for each.
    """
    pairs = [(m, each) for m in methods for each in (schedules if m.endswith("lvx") else ("",))]
    ways = {label(*pair): pair for pair in pairs}
    problems = {way: obstacle(shape, way) for way in ways}
    costs = {way: cost(shape, cluster, way) for way in ways if problems[way] is None}
    if not costs:
        reasons = "; ".join(problem for problem in problems.values() if problem is not None)
        raise ValueError(f"got no method that can run this call: {reasons}")
    # sorted keeps the order of equal ones: the answer is the same everywhere.
    best, *slower = sorted(costs, key=lambda way: costs[way].seconds)
    alone_s = cost(shape, cluster, "none").seconds
    reason = f"{best}: {duration(costs[best].seconds)} predicted, most of it {_most(costs[best])}"
    if slower:
        reason += f"; next {slower[0]} with {duration(costs[slower[0]].seconds)}"
    if alone_s < costs[best].seconds:
        reason += f"; so small that one rank alone would be faster, {duration(alone_s)}"
    method, schedule = ways[best]
    return Choice(method, schedule or "gather", costs[best].seconds, reason, alone_s)


def _most(best: Cost) -> str:
    passes = (best.forward, best.backward)
    parts = {
        "attention kernels": sum(each.kernel_s for each in passes),
        "the projection of K and V": sum(each.projection_s for each in passes),
        "the network": best.exposed_s,
        "calls, merging and copies": sum(each.other_s for each in passes),
    }
    return max(parts, key=lambda part: parts[part])
