"""How a rank spends a forward or a backward, by method and schedule.

A walk goes through the code: what the rank computes, and what its link carries at the same time.
What rotates counts with its mean length, because each rank meets every shard once; what stays, with
the longest. docs/planning.md has the formulas; tests/sent.py has the bytes of each rank exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

from ds_lvx.attention.shape import ACROSS, Hybrid, goes_at_once, head_groups, leaving_groups
from ds_lvx.plan.pieces import FP32_BYTES, Pieces, across, message_bytes, padded, subgroup
from ds_lvx.plan.transfers import Transfer


def _alone(pieces: Pieces) -> None:
    """All queries and keys on one rank, whose neighbours are idle."""
    device, queries, keys = pieces.device, pieces.queries, pieces.keys
    compute = pieces.timeline.compute
    kernel = device.whole_alone or device.whole
    if pieces.backward:
        kernel = device.backward_alone or device.backward
        compute(device.alone * pieces.touch_s(pieces.of_q(queries), "delta"), "other")
    if not pieces.backward or pieces.shape.recompute:
        compute(device.alone * pieces.project_s(keys), "projection")
    pieces.attend(queries, keys, kernel=kernel)
    if pieces.backward:
        compute(device.alone * pieces.project_s(keys, gradients=True), "projection")


# ---- lvx: a walk through ds_lvx.attention.schedules


def _gather(pieces: Pieces) -> None:
    """All queries arrive, one kernel, the parts go home; a group of heads after the other."""
    again, backward, timeline = pieces.shape.recompute, pieces.backward, pieces.timeline
    # What recomputes K and V attends to all heads at once.
    shares = (1.0,) if again else pieces.shares(head_groups, pieces.shape.kv_heads)
    copies = ("copy", "copy") if backward else ("copy",)
    mine, everyone = pieces.of_q(pieces.most_queries), pieces.of_q(pieces.queries)
    # One message of rows, in which each tensor is padded.
    out, part = (pieces.most_queries * message_bytes(row) for row in (pieces.query, pieces.part))
    _begin(pieces)
    pieces.touch(shares[0] * mine, *copies)
    arrives = timeline.post(pieces.ranks.gather(shares[0] * out))
    if again:
        pieces.project()
    returning = []
    for share, following in zip(shares, (*shares[1:], 0.0), strict=True):
        timeline.wait(arrives)
        if following:
            pieces.touch(following * mine, *copies)
            arrives = timeline.post(pieces.ranks.gather(following * out))
        pieces.touch(share * everyone, *copies)
        pieces.attend(pieces.queries, pieces.most_keys, share=share)
        pieces.touch(share * everyone, "encode", "copy")
        returning.append(timeline.post(pieces.ranks.exchange(share * part)))
    if backward and len(shares) > 1:
        pieces.touch(pieces.of_k_and_v(pieces.most_keys), "copy")
    if backward and again:
        pieces.project(gradients=True)
    for share, arrives in zip(shares, returning, strict=True):
        timeline.wait(arrives)
        adding = "sum stacked" if backward else "merge stacked"
        pieces.touch(pieces.n * share * mine, "decode", adding)
    if backward and not again:
        pieces.project(gradients=True)


def _rotate_queries(pieces: Pieces) -> None:
    """The next queries and the last part travel under each kernel; dk and dv add up in fp32."""
    backward, again, queries = pieces.backward, pieces.shape.recompute, pieces.mean_queries
    rows, keys = pieces.of_q(queries), pieces.of_k_and_v(pieces.most_keys)
    _begin(pieces)
    _rotate(
        pieces,
        ahead_bytes=queries * sum(pieces.query),
        home_bytes=queries * sum(pieces.part),
        kernel_s=pieces.attend_s(queries, pieces.most_keys),
        later_s=pieces.touch_s(keys, "add 16 bits to fp32") if backward else 0.0,
        encode_s=pieces.touch_s(rows, "encode"),
        add_s=pieces.touch_s(rows, "decode", "add fp32" if backward else "merge"),
        cast_s=pieces.touch_s(keys, "cast", "cast") if backward else 0.0,
        again=again,
    )
    if backward and not again:
        pieces.project(gradients=True)


def _replicated(pieces: Pieces) -> None:
    """Everyone has all queries; parts are gathered, or lse is gathered and out summed; or dq."""
    queries, backward = pieces.most_queries, pieces.backward
    summed_bytes = pieces.of_q(queries) * FP32_BYTES
    if backward:
        pieces.touch(pieces.of_q(queries), "delta")
    if not backward or pieces.shape.recompute:
        pieces.project()
    pieces.attend(queries, pieces.most_keys)
    if backward:
        pieces.project(gradients=True)
    elif goes_at_once(summed_bytes, pieces.n):
        part = message_bytes([pieces.lse_bytes(queries), summed_bytes])
        pieces.send(pieces.ranks.gather(part))
        pieces.touch(pieces.n * pieces.of_q(queries), "merge stacked")
        return
    else:
        pieces.send(pieces.ranks.gather(pieces.lse_bytes(queries)))
        pieces.touch(pieces.of_q(queries), "merge")
    pieces.send(pieces.ranks.all_reduce(summed_bytes))


def _begin(pieces: Pieces) -> None:
    """What comes before lvx's first transfer: delta, or K and V that are kept."""
    if pieces.backward:
        pieces.touch(pieces.of_q(pieces.most_queries), "delta")
    elif not pieces.shape.recompute:
        pieces.project()


# ---- ring attention and Ulysses


def _rotate_keys(pieces: Pieces) -> None:
    """The next keys travel under each kernel; in backward, so do dk and dv of the last block."""
    backward, rows = pieces.backward, pieces.of_q(pieces.most_queries)
    keys, nbytes = pieces.of_k_and_v(pieces.mean_keys), pieces.kv_bytes(pieces.mean_keys)
    merging = pieces.touch_s(rows, "add fp32" if backward else "merge")
    if backward:
        pieces.touch(rows, "delta")
    else:
        pieces.project()
    _rotate(
        pieces,
        ahead_bytes=nbytes,
        home_bytes=nbytes if backward else None,
        kernel_s=pieces.attend_s(pieces.most_queries, pieces.mean_keys),
        first_s=merging + pieces.touch_s(keys, "cast") if backward else 0.0,
        later_s=merging,
        add_s=pieces.touch_s(keys, "add 16 bits to fp32"),
    )
    if backward:
        pieces.touch(keys, "cast")
        pieces.project(gradients=True)


def _ulysses(pieces: Pieces) -> None:
    """q, k and v arrive; a kernel over all keys and some heads; out leaves by groups of heads."""
    if not pieces.backward:
        pieces.project()
    wide = pieces.beside(padded(pieces.shape))
    arriving, leaving = _both_ways(wide)
    wide.timeline.wait(_all_to_all(wide, arriving))
    if wide.backward:
        wide.touch(arriving, "delta")
    returning = []
    for share in wide.shares(leaving_groups, wide.shape.kv_heads // wide.n):
        wide.attend(wide.queries, wide.keys, share=share / wide.n, kernel=wide.whole)
        returning.append(_all_to_all(wide, share * leaving))
    for arrives in returning:
        wide.timeline.wait(arrives)
    if pieces.backward:
        pieces.project(gradients=True)


def _both_ways(wide: Pieces) -> tuple[float, float]:
    """Numbers that a rank splits by heads, and that it joins again by tokens: q, k and v, and out;
    dout, and dq, dk and dv."""
    q = wide.of_q(wide.most_queries)
    all_three = q + wide.of_k_and_v(wide.most_keys)
    return (q, all_three) if wide.backward else (all_three, q)


def _all_to_all(wide: Pieces, numbers: float) -> float:
    """Start one; when it will have arrived."""
    wide.touch(numbers, "around an all-to-all")
    nbytes = numbers * wide.shape.element_bytes / wide.n
    return wide.timeline.post(wide.ranks.exchange(nbytes))


# ---- Ulysses inside subgroups, another way across


def _hybrid(pieces: Pieces, *, hybrid: Hybrid, way: Way) -> None:
    """All-to-alls of a subgroup before and after the other way's walk."""
    shape, backward = pieces.shape, pieces.backward
    if not backward:
        pieces.project()
    groups = across(shape, hybrid)
    held = [
        shape.heads * queries + 2 * shape.kv_heads * keys
        for queries, keys in zip(groups.q_lengths, groups.kv_lengths, strict=True)
    ]
    wide = pieces.beside(padded(subgroup(shape, hybrid, held.index(max(held)))))
    arriving, leaving = _both_ways(wide)
    if hybrid.ulysses > 1:
        wide.timeline.wait(_all_to_all(wide, arriving))
    if hybrid.ulysses < shape.ranks:
        way.walk(pieces.beside(groups, stride=hybrid.ulysses))
    else:
        wide.attend(wide.queries, wide.keys, share=1 / wide.n, kernel=wide.whole)
    if hybrid.ulysses > 1:
        wide.timeline.wait(_all_to_all(wide, leaving))
    if backward:
        pieces.project(gradients=True)


# ---- what rotates


def _rotate(
    pieces: Pieces,
    *,
    ahead_bytes: float,  # passed on under each kernel
    home_bytes: float | None,  # of what the last kernel gave for another rank; None: it stays
    kernel_s: float,  # of each block
    first_s: float = 0.0,  # after the kernel on what is this rank's own
    later_s: float = 0.0,  # after the others
    encode_s: float = 0.0,  # of a part before it leaves
    add_s: float = 0.0,  # of a part that has arrived
    cast_s: float = 0.0,  # at the end
    again: bool = False,  # K and V are projected
) -> None:
    """A ring's turns.

    K and V are projected under the first transfer, and in backward their gradients go back under
    the last.
    """
    timeline, n, per_node = pieces.timeline, pieces.n, pieces.ranks.per_node
    # Two ranks have one step: what goes home leaves when the other transfer is over.
    crowded = home_bytes is not None and n > 2
    ahead = pieces.ranks.shift(ahead_bytes, crowded=crowded)

    @cache
    def home(hops: int) -> Transfer:
        return pieces.ranks.shift(home_bytes or 0.0, hops=hops, crowded=crowded)

    returning: float | None = None
    for step in range(n):
        following = timeline.post(ahead) if step < n - 1 else None
        if step == 0 and again:
            pieces.project()
        timeline.compute(kernel_s, "kernel")
        timeline.compute(later_s if step else first_s, "other")
        if step and home_bytes is not None:
            if returning is not None:
                timeline.wait(returning)
                timeline.compute(add_s, "other")
            timeline.compute(encode_s, "other")
            # Where all of a node leave it, or as many go the other way, the time is the same.
            returning = timeline.post(home(min(step, n - step, per_node)))
        if following is not None:
            timeline.wait(following)
    timeline.compute(cast_s, "other")
    if pieces.backward and again:
        pieces.project(gradients=True)
    if returning is not None:
        timeline.wait(returning)
        timeline.compute(add_s, "other")


class Way(NamedTuple):
    """One way of attending to what is split."""

    walk: Callable[[Pieces], None]  # spends a pass on the timeline of its pieces
    rule: tuple[str, ...] = ()  # what a bare operator gathers of it before: ``q`` and ``kv``
    hybrid: Hybrid | None = None  # its subgroups
    inner: str = ""  # what runs across them


WAYS = {
    "lvx ring": Way(_rotate_queries, ("q",)),
    "lvx gather": Way(_gather, ("q",)),
    "lvx replicated": Way(_replicated),
    "ring": Way(_rotate_keys, ("kv",)),
    "ulysses": Way(_ulysses, ("q", "kv")),
    "none": Way(_alone),
}
"""By name: the method, and the schedule of lvx. Hybrids are made of them (`way_of`)."""


def way_of(name: str) -> Way:
    """A way by its name: one of `WAYS`, or ``"hybrid 4 ring"``, ``"hybrid 8 lvx gather"``.

    Raises:
        ValueError: an unknown one; lists the known.
    """
    if name in WAYS:
        return WAYS[name]
    if found := re.fullmatch(rf"hybrid (\d+) (({'|'.join(ACROSS)}).*)", name):
        ulysses, inner, method = found.groups()
        if inner in WAYS:
            hybrid = Hybrid(int(ulysses), method)
            walk = partial(_hybrid, hybrid=hybrid, way=WAYS[inner])
            return Way(walk, ("q", "kv"), hybrid, inner)
    raise ValueError(
        f"way: got {name!r}; expected one of {list(WAYS)}, or a hybrid of them: 'hybrid 4 ring'; "
        "what the registry has needs a row in WAYS of ds_lvx/plan/walks.py"
    )


def label(method: str, schedule: str) -> str:
    """The name of a way: ``"lvx ring"``, ``"ulysses"``; schedules other than lvx's mean nothing."""
    return f"{method} {schedule}" if method.split(" ")[-1] == "lvx" else method
