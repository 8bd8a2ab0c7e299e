"""Predicted time and bytes of one attention call, by method and schedule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from ds_lvx.attention.shape import AttentionShape
from ds_lvx.plan.cluster import Cluster
from ds_lvx.plan.pieces import Pieces, Sizes, across
from ds_lvx.plan.transfers import Pass
from ds_lvx.plan.walks import WAYS, Way, hybrid_of, way_of

_AGREEMENT_BYTES = 2048
_MAX_GATHERED_BYTES = 2**30
"""Queries of all ranks that the schedule ``gather`` may hold on each."""


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
def cost(shape: AttentionShape, cluster: Cluster, way: str, *, settled: bool = True) -> Cost:
    """Predict one call; the group's ranks are adjacent.

    ``way`` is the method, and the schedule of lvx, such as ``"ulysses"`` and ``"lvx gather"``;
    ``"none"``: everything on one rank. Without ``settled`` the agreement of an operator that is
    called by itself comes before.

    Raises:
        ValueError: an unknown way, or one that cannot split these heads.
    """
    taken = _way_of(shape, way)
    splits = way == "ulysses" or hybrid_of(way) is not None
    if splits and (problem := obstacle(shape, way)) is not None:
        raise ValueError(problem)
    passes = []
    for backward in (False, True)[: 1 + shape.backward]:
        pieces = Pieces(shape, cluster, backward=backward)
        pieces.timeline.compute(cluster.device.call_s, "other")
        if not backward and taken is not WAYS["none"]:
            twice = shape.recompute and way.startswith("lvx")
            _settle(pieces, taken, agreements=0 if settled else 2 if twice else 1)
        taken.walk(pieces)
        passes.append(pieces.timeline.result())
    return Cost(passes[0], passes[1] if shape.backward else Pass())


def _settle(pieces: Pieces, way: Way, *, agreements: int) -> None:
    """What a bare operator does before it attends: it agrees, and gathers the rule."""
    # The control plane is not part of the bytes.
    agreement = replace(pieces.ranks.gather(_AGREEMENT_BYTES), sent_bytes=0.0, messages=0)
    for _ in range(agreements):
        pieces.send(agreement)
    rule = pieces.rule_bytes(way.rule, queries=pieces.most_queries, keys=pieces.most_keys)
    if rule:
        pieces.send(pieces.ranks.gather(rule))


def _way_of(shape: AttentionShape, way: str) -> Way:
    found = way_of(way)
    if found is None:
        raise ValueError(
            f"way: got {way!r}; expected one of {list(WAYS)}, or a hybrid of them: 'hybrid 4 ring'"
        )
    return WAYS["none"] if shape.ranks == 1 else found  # a rank by itself attends alone


def obstacle(shape: AttentionShape, way: str) -> str | None:
    """Why a way cannot or should not run a call; None where it can."""
    if way == "ulysses" and shape.heads < shape.ranks:
        return f"ulysses: {shape.heads} heads do not reach {shape.ranks} ranks"
    hybrid = hybrid_of(way)
    if hybrid is not None:
        if shape.ranks % hybrid.ulysses:
            return f"{way}: {hybrid.ulysses} does not divide {shape.ranks} ranks"
        if shape.heads < hybrid.ulysses:
            return f"{way}: {shape.heads} heads do not reach {hybrid.ulysses} ranks"
        _, _, inner = way.split(" ", 2)
        problem = obstacle(across(shape, hybrid), inner)
        return None if problem is None else f"{way}: {problem}"
    gathered_bytes = Sizes(shape).q_bytes(sum(shape.q_lengths))
    if way == "lvx gather" and gathered_bytes > _MAX_GATHERED_BYTES:
        return f"lvx gather: the queries of all ranks are {gathered_bytes / 2**30:.1f} GiB"
    return None
