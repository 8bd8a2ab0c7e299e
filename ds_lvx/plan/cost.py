"""Predicted time and bytes of one attention call, by method and schedule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from ds_lvx.attention.shape import AttentionShape
from ds_lvx.plan.cluster import Cluster
from ds_lvx.plan.pieces import Pieces, across
from ds_lvx.plan.transfers import Pass
from ds_lvx.plan.walks import WAYS, Way, way_of

_AGREEMENT_BYTES = 2048
_INT32_BYTES = 4
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
    taken = way_of(way)
    if (way == "ulysses" or taken.hybrid is not None) and (problem := obstacle(shape, way)):
        raise ValueError(problem)
    if shape.ranks == 1:  # a rank by itself attends alone
        taken = WAYS["none"]
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
    # q_start and q_end of queries that travel, kv_pos of keys that do. The ranks of a patched model
    # know the rule from the batch.
    numbers = 2 * pieces.most_queries * ("q" in way.rule) + pieces.most_keys * ("kv" in way.rule)
    if pieces.shape.visibility and numbers:
        pieces.send(pieces.ranks.gather(_INT32_BYTES * pieces.shape.batch * numbers))


def obstacle(shape: AttentionShape, way: str) -> str | None:
    """Why a way cannot or should not run a call; None where it can."""
    hybrid = way_of(way).hybrid
    if hybrid is not None:
        if shape.ranks % hybrid.ulysses:
            return f"{way}: {hybrid.ulysses} does not divide {shape.ranks} ranks"
        if shape.heads < hybrid.ulysses:
            return f"{way}: {shape.heads} heads do not reach {hybrid.ulysses} ranks"
        problem = obstacle(across(shape, hybrid), way_of(way).inner)
        return None if problem is None else f"{way}: {problem}"
    if way == "ulysses" and shape.heads < shape.ranks:
        return f"ulysses: {shape.heads} heads do not reach {shape.ranks} ranks"
    q_bytes = (
        shape.batch * sum(shape.q_lengths) * shape.heads * shape.head_dim * shape.element_bytes
    )
    if way == "lvx gather" and q_bytes > _MAX_GATHERED_BYTES:
        return f"lvx gather: the queries of all ranks are {q_bytes / 2**30:.1f} GiB"
    return None
