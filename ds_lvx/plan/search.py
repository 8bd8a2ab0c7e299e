"""From a scenario and a cluster to a plan: every group size and method, what fits, what is best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ds_lvx.plan.choose import candidates, label, obstacle
from ds_lvx.plan.cluster import Cluster
from ds_lvx.plan.memory import footprint
from ds_lvx.plan.scenario import Scenario
from ds_lvx.plan.step import Step, step

CANDIDATES = candidates(("lvx", "ulysses", "ring"), ("gather", "ring"))
"""Method and schedule of every plan."""
MEMORY_SHARE = 0.92
"""Of a device's memory that a plan may fill; the rest is the driver's and the allocator's."""
_MOST_GPUS = 2**20


@dataclass(frozen=True)
class Stop:
    """How far a method goes on these GPUs.

    Attributes:
        name: of the method and schedule.
        fits_from: the smallest group whose memory suffices; None where none does.
        fastest_at: the group with the shortest step among those that fit.
        ends_at: the largest group it can run.
        reason: in one line, why it stops.
    """

    name: str
    fits_from: int | None
    fastest_at: int | None
    ends_at: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
        steps: every group size, method and schedule that can run.
        best: the one with the most samples a second that fits.
        quickest: the one with the shortest step that fits.
        stops: by method.
        limit_bytes: memory of a device that a plan may fill.
    """

    steps: tuple[Step, ...]
    best: Step
    quickest: Step
    stops: tuple[Stop, ...]
    limit_bytes: int

    def at(self, ranks: int) -> list[Step]:
        """All methods with one group size, fastest first."""
        found = [each for each in self.steps if each.ranks == ranks]
        return sorted(found, key=_seconds)

    def fits(self, each: Step) -> bool:
        """Whether a step's memory suffices."""
        return each.footprint.peak <= self.limit_bytes


def plan(scenario: Scenario, cluster: Cluster, *, group: int | None = None) -> Plan:
    """Look at all groups that divide the GPUs, or at one.

    Raises:
        ValueError: ``group`` does not divide the GPUs, or nothing fits; says by how much, and what
            would.
    """
    groups = divisors(cluster.gpus) if group is None else [group]
    if cluster.gpus % groups[0]:
        raise ValueError(
            f"group: got {group} for {cluster.gpus} GPUs; expected one of {divisors(cluster.gpus)}"
        )
    # One rank needs no method; lvx stands for all, as it can recompute.
    ways = [
        (ranks, *way)
        for ranks in groups
        for way in (CANDIDATES if ranks > 1 else [("lvx", "gather")])
        if ranks == 1 or obstacle(scenario.cross_shape(ranks, way[0]), *way) is None
    ]
    steps = tuple(
        step(scenario, cluster, ranks=ranks, method=method, schedule=schedule)
        for ranks, method, schedule in ways
    )
    limit_bytes = int(MEMORY_SHARE * cluster.device.memory_bytes)
    fitting = [each for each in steps if each.footprint.peak <= limit_bytes]
    if not fitting:
        raise ValueError(_nothing_fits(scenario, cluster, steps, limit_bytes))
    return Plan(
        steps=steps,
        best=min(fitting, key=lambda each: each.seconds * each.ranks),
        quickest=min(fitting, key=_seconds),
        stops=tuple(_stops(scenario, steps, groups, limit_bytes)),
        limit_bytes=limit_bytes,
    )


def divisors(number: int) -> list[int]:
    """In order."""
    small = [each for each in range(1, int(number**0.5) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})


def _seconds(each: Step) -> float:
    return each.seconds


# --------------------------------------------------------------------------------------------
# Where each method stops


def _stops(
    scenario: Scenario, steps: Sequence[Step], groups: Sequence[int], limit_bytes: int
) -> list[Stop]:
    found = []
    for method, schedule in CANDIDATES:
        way = (method, schedule)
        own = [each for each in steps if (each.method, each.schedule) == way and each.ranks > 1]
        if not own:
            continue
        fitting = [each for each in own if each.footprint.peak <= limit_bytes]
        fastest = min(fitting, key=_seconds, default=None)
        beyond = [ranks for ranks in groups if ranks > own[-1].ranks]
        shape = scenario.cross_shape(beyond[0], method) if beyond else None
        found.append(
            Stop(
                name=label(*way),
                fits_from=fitting[0].ranks if fitting else None,
                fastest_at=None if fastest is None else fastest.ranks,
                ends_at=own[-1].ranks,
                reason=_reason(own, fastest, None if shape is None else obstacle(shape, *way)),
            )
        )
    return found


def _reason(own: Sequence[Step], fastest: Step | None, problem: str | None) -> str:
    """``problem`` is what keeps the method off larger groups."""
    if fastest is None:
        return f"memory; {problem}" if problem else "memory: no group of these GPUs is large enough"
    larger = [each for each in own if each.ranks > fastest.ranks]
    if larger:
        growing = {name: larger[0].parts[name] - fastest.parts[name] for name in fastest.parts}
        part = max(growing, key=lambda name: growing[name])
        return f"latency: beyond {fastest.ranks} ranks the step gets longer ({part})"
    return problem or "does not stop on these GPUs"


# --------------------------------------------------------------------------------------------
# Where nothing fits


def _nothing_fits(
    scenario: Scenario, cluster: Cluster, steps: Sequence[Step], limit_bytes: int
) -> str:
    least = min(steps, key=lambda each: each.footprint.peak)
    need, have = (size / 2**30 for size in (least.footprint.peak, limit_bytes))
    name = label(least.method, least.schedule)
    remedies = _remedies(scenario, cluster, least, limit_bytes) or ["a card with more memory"]
    return (
        f"memory: no plan fits {cluster.gpus} x {cluster.device.name}; the smallest, {name} on "
        f"groups of {least.ranks}, needs {need:.1f} GiB a rank and {have:.1f} GiB may be filled: "
        f"{need - have:.1f} GiB too much. What would fit: {'; '.join(remedies)}"
    )


def _remedies(scenario: Scenario, cluster: Cluster, least: Step, limit_bytes: int) -> list[str]:
    way = {"method": least.method, "schedule": least.schedule}

    def fits(gpus: int = cluster.gpus, ranks: int = least.ranks, **changes: Any) -> bool:
        changed = replace(scenario, **changes)
        return footprint(changed, gpus=gpus, ranks=ranks, **way).peak <= limit_bytes

    found = []
    frames = _most(scenario.frames, lambda count: fits(frames=count))
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
        "--train cross": {"trains": "cross"},
    }
    # One that changes nothing does not fit either.
    return found + [words for words, each in changes.items() if fits(**each)]


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to ``limit`` that fits; 0 where 1 does not."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
