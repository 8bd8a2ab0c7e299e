"""Predicted time and bytes of one attention call, by method and schedule.

The tables of README.md and docs/how-it-works.md, and the tests that hold `ds_lvx.traffic` to its
bytes, come from `bytes_sent`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from ds_lvx.attention.shape import AttentionShape
from ds_lvx.plan.cluster import Cluster
from ds_lvx.plan.messages import Messages
from ds_lvx.plan.pieces import Pieces
from ds_lvx.plan.transfers import Pass, Timeline
from ds_lvx.plan.walks import WAYS, Way, way_of

# Not from the registry: its package imports torch, and `ds-lvx plan` does without.
METHODS = tuple(dict.fromkeys(name.partition(" ")[0] for name in WAYS))
SCHEDULES = tuple(name.partition(" ")[2] for name in WAYS if " " in name)

_AGREEMENT_BYTES = 2048


@dataclass(frozen=True)
class Cost:
    """A call's forward and backward (zeros where there is none)."""

    forward: Pass
    backward: Pass

    @property
    def seconds(self) -> float:
        """Both passes."""
        return self.forward.seconds + self.backward.seconds

    @property
    def exposed_s(self) -> float:
        """Waiting for the network, in both passes."""
        return self.forward.exposed_s + self.backward.exposed_s

    @property
    def bytes_sent(self) -> float:
        """By the rank that sends most, in both passes."""
        return self.forward.bytes_sent + self.backward.bytes_sent


@lru_cache(maxsize=4096)
def cost(
    shape: AttentionShape,
    cluster: Cluster,
    *,
    method: str,
    schedule: str = "gather",
    overlap: bool = True,
    settled: bool = True,
) -> Cost:
    """Predict one call.

    Args:
        shape: the call.
        cluster: where it runs; the group's ranks are adjacent.
        method: ``"lvx"``, ``"ring"``, ``"ulysses"``, or ``"none"``: everything on one rank.
        schedule: of lvx.
        overlap: False waits for each transfer at once.
        settled: False adds the agreement of an operator that is called by itself.

    Raises:
        ValueError: an unknown method or schedule, or a method that cannot split these heads.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}; expected one of {list(METHODS)}")
    if method == "lvx" and schedule not in SCHEDULES:
        raise ValueError(f"schedule: got {schedule!r}; expected one of {list(SCHEDULES)}")
    if method == "ulysses" and shape.heads < shape.ranks:
        raise ValueError(
            f"ulysses: got {shape.heads} query heads for {shape.ranks} ranks; expected at least "
            "one head a rank"
        )
    way = way_of(shape, method, schedule)
    passes = []
    for backward in (False, True)[: 1 + shape.backward]:
        pieces = Pieces(shape, cluster, Timeline(overlap=overlap))
        pieces.timeline.compute(cluster.device.call_s, "other")
        if not backward and way is not WAYS["none"]:
            agreements = 0 if settled else 2 if shape.recompute and method == "lvx" else 1
            _settle(pieces, way, agreements=agreements)
        way.walk(pieces, backward)
        passes.append(pieces.timeline.result())
    return Cost(passes[0], passes[1] if shape.backward else Pass())


def _settle(pieces: Pieces, way: Way, *, agreements: int) -> None:
    """What a bare operator does before it attends: it agrees, and gathers the rule."""
    ranks, timeline = pieces.ranks, pieces.timeline
    # The control plane is not part of the bytes.
    agreement = replace(ranks.gather(_AGREEMENT_BYTES), sent_bytes=0.0, messages=0)
    for _ in range(agreements):
        timeline.wait(timeline.post(agreement))
    queries, keys = pieces.most_queries, pieces.most_keys
    rule = pieces.message.rule(way.rule, queries=queries, keys=keys)
    if rule:
        timeline.wait(timeline.post(ranks.gather(rule)))


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
    way, message = way_of(shape, method, schedule), Messages(shape, factors)
    mine = {"queries": shape.q_lengths[rank], "keys": shape.kv_lengths[rank]}
    forward, backward = way.sends(message, rank)
    rule = (shape.ranks - 1) * message.rule(way.rule, **mine)
    return Sent(rule, forward, backward if shape.backward else 0)
