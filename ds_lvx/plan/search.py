"""From a scenario and a cluster to a plan: every group size and method, what fits, what is best."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from ds_lvx.plan.cluster import Cluster
from ds_lvx.plan.cost import obstacle
from ds_lvx.plan.memory import footprint, tower_bytes
from ds_lvx.plan.scenario import Scenario
from ds_lvx.plan.step import Step, step

CANDIDATES = ("lvx gather", "lvx ring", "ulysses", "ring")
"""Method and schedule of every plan."""
_MOST_GPUS = 2**20
_SECONDS = attrgetter("seconds")


@dataclass(frozen=True)
class Stop:
    """How far a method goes on these GPUs."""

    name: str  # of the method and schedule
    fits_from: int | None  # the smallest group whose memory suffices; None where none does
    fastest_at: int | None  # the group with the shortest step among those that fit
    ends_at: int  # the largest group it can run
    reason: str  # in one line, why it stops


@dataclass(frozen=True)
class Plan:
    """The answer."""

    steps: tuple[Step, ...]  # every group size and method that can run; small groups first
    best: Step  # the one with the most samples a second that fits
    quickest: Step  # the one with the shortest step that fits
    stops: tuple[Stop, ...]  # by method

    def at(self, ranks: int) -> list[Step]:
        """All methods with one group size, fastest first."""
        return sorted((each for each in self.steps if each.ranks == ranks), key=_SECONDS)


def plan(scenario: Scenario, cluster: Cluster, *, group: int | None = None) -> Plan:
    """Look at all groups that divide the GPUs, or at one.

    Raises:
        ValueError: ``group`` does not divide the GPUs; nothing fits, by how much, and what would.
    """
    groups = cluster.groups(group)
    steps = tuple(
        step(scenario, cluster, ranks=ranks, way=way)
        for ranks in groups
        # One rank needs no method; lvx stands for all, as it can recompute.
        for way in (CANDIDATES if ranks > 1 else CANDIDATES[:1])
        if ranks == 1 or obstacle(scenario.cross_shape(ranks, way), way) is None
    )
    fitting = [each for each in steps if each.fits]
    if not fitting:
        raise ValueError(_nothing_fits(scenario, cluster, steps))
    stops = (
        _stop(scenario, groups, [each for each in steps if each.way == way and each.ranks > 1])
        for way in CANDIDATES
    )
    return Plan(
        steps=steps,
        best=min(fitting, key=lambda each: each.seconds * each.ranks),
        quickest=min(fitting, key=_SECONDS),
        stops=tuple(each for each in stops if each is not None),
    )


def _stop(scenario: Scenario, groups: Sequence[int], own: Sequence[Step]) -> Stop | None:
    """Where a method stops, of its own steps; None where it does not even begin."""
    if not own:
        return None
    way, ends_at = own[-1].way, own[-1].ranks
    beyond = next((ranks for ranks in groups if ranks > ends_at), None)
    problem = None if beyond is None else obstacle(scenario.cross_shape(beyond, way), way)
    fitting = [each for each in own if each.fits]
    if not fitting:
        problem = f"; {problem}" if problem else ": no group of these GPUs is large enough"
        return Stop(way, None, None, ends_at, f"memory{problem}")
    fastest = min(fitting, key=_SECONDS)
    reason = problem or "does not stop on these GPUs"
    larger = next((each for each in own if each.ranks > fastest.ranks), None)
    if larger is not None:
        part = max(larger.parts, key=lambda name: larger.parts[name] - fastest.parts[name])
        reason = f"latency: beyond {fastest.ranks} ranks the step gets longer ({part})"
    return Stop(way, fitting[0].ranks, fastest.ranks, ends_at, reason)


# ---- where nothing fits


def _nothing_fits(scenario: Scenario, cluster: Cluster, steps: Sequence[Step]) -> str:
    least = min(steps, key=lambda each: (each.footprint.peak, -each.ranks))
    need, have = (each / 2**30 for each in (least.footprint.peak, cluster.device.limit_bytes))
    remedies = _remedies(scenario, cluster, least) or ["a card with more memory"]
    alone = tower_bytes(scenario, scenario.model.tower_tokens)[0]
    if alone > cluster.device.limit_bytes:
        remedies = [
            f"smaller frames: one alone, which no ranks share, needs {alone / 2**30:.1f} GiB in "
            "the tower"
        ]
    return (
        f"memory: no plan fits {cluster.gpus} x {cluster.device.name}; the smallest, {least.way} "
        f"on groups of {least.ranks}, needs {need:.1f} GiB a rank and {have:.1f} GiB may be "
        f"filled: {need - have:.1f} GiB too much. What would fit: {'; '.join(remedies)}"
    )


def _remedies(scenario: Scenario, cluster: Cluster, least: Step) -> list[str]:
    def fits(gpus: int = cluster.gpus, ranks: int = least.ranks, **changes: Any) -> bool:
        changed = replace(scenario, **changes)
        needed = footprint(changed, gpus=gpus, ranks=ranks, way=least.way).peak
        return needed <= cluster.device.limit_bytes

    found = []
    # The first count that does not fit.
    frames = bisect_left(range(1, scenario.frames + 1), True, key=lambda n: not fits(frames=n))
    if frames:
        found.append(f"{frames} of the {scenario.frames} frames")
    gpus = cluster.gpus
    while gpus < _MOST_GPUS and not fits(gpus, gpus):
        gpus *= 2
    if fits(gpus, gpus):
        found.append(f"{gpus} GPUs in one group")
    changes: dict[str, dict[str, Any]] = {
        "--recompute and --checkpointing": {"recompute": True, "checkpointing": True},
        "--zero 3": {"zero_stage": 3},
        "--train cross": {"trains": "cross", "lora_r": 0, "load_in_4bit": False},
        "--lora_r 8": {"trains": "all", "lora_r": 8},
        "no --load_in_4bit": {"load_in_4bit": False},
        "--lora_r 8 --load_in_4bit": {"trains": "all", "lora_r": 8, "load_in_4bit": True},
    }
    # One that changes nothing does not fit either.
    return found + [words for words, each in changes.items() if fits(**each)]
