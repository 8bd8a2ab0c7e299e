"""How a rank spends a forward or a backward, and what it sends, by method and schedule.

A walk goes through the code: what the rank computes, and what its link carries at the same time.
What rotates counts with its mean length, because each rank meets every shard once; what stays, with
the longest. Beside each walk stands what a rank sends in both passes, exactly, for shards of any
length. docs/planning.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from ds_lvx.attention.shape import AttentionShape
from ds_lvx.plan.messages import Messages, padded
from ds_lvx.plan.pieces import Pieces
from ds_lvx.plan.transfers import Transfer


def _alone(pieces: Pieces, backward: bool) -> None:
    """All queries and keys on one rank, whose neighbours are idle."""
    device, queries, keys = pieces.device, pieces.queries, pieces.keys
    compute = pieces.timeline.compute
    kernel = device.whole_alone or device.whole
    if backward:
        kernel = device.backward_alone or device.backward
        compute(device.alone * pieces.touch_s(pieces.of_q(queries), "delta"), "other")
    if not backward or pieces.shape.recompute:
        compute(device.alone * pieces.project_s(keys), "projection")
    pieces.attend(kernel, queries, keys)
    if backward:
        compute(device.alone * pieces.project_s(keys, backward=True), "projection")


# --------------------------------------------------------------------------------------------
# lvx: a walk through ds_lvx.attention.schedules


def _gather(pieces: Pieces, backward: bool) -> None:
    """All queries arrive, one kernel, the parts go home; a group of heads after the other."""
    shares, again, timeline = pieces.head_shares, pieces.shape.recompute, pieces.timeline
    copies = ("copy", "copy") if backward else ("copy",)
    mine, everyone = pieces.of_q(pieces.most_queries), pieces.of_q(pieces.queries)
    out = pieces.message.queries(pieces.most_queries, backward=backward)
    part = pieces.message.part(pieces.most_queries, backward=backward)
    kernel = pieces.device.backward if backward else pieces.device.partial
    _begin(pieces, backward)
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
        pieces.attend(kernel, pieces.queries, pieces.most_keys, share=share)
        pieces.touch(share * everyone, "encode", "copy")
        returning.append(timeline.post(pieces.ranks.exchange(share * part)))
    if backward and len(shares) > 1:
        pieces.touch(pieces.of_k_and_v(pieces.most_keys), "copy")
    if backward and again:
        pieces.project(backward=True)
    for share, arrives in zip(shares, returning, strict=True):
        timeline.wait(arrives)
        adding = "sum stacked" if backward else "merge stacked"
        pieces.touch(pieces.n * share * mine, "decode", adding)
    if backward and not again:
        pieces.project(backward=True)


def _gather_sends(message: Messages, rank: int) -> tuple[float, float]:
    """A rank's own queries to everyone, the parts of all others home."""
    mine, others = _mine_and_others(message.shape.q_lengths, rank)
    n = message.shape.ranks
    forward, backward = (
        (n - 1) * message.queries(mine, backward=each) + message.part(others, backward=each)
        for each in (False, True)
    )
    return forward, backward


def _rotate_queries(pieces: Pieces, backward: bool) -> None:
    """The next queries and the last part travel under each kernel; dk and dv add up in fp32."""
    device, again, queries = pieces.device, pieces.shape.recompute, pieces.mean_queries
    rows, keys = pieces.of_q(queries), pieces.of_k_and_v(pieces.most_keys)
    _begin(pieces, backward)
    _rotate(
        pieces,
        ahead_bytes=pieces.message.queries(queries, backward=backward),
        home_bytes=pieces.message.part(queries, backward=backward),
        # Two ranks have one step, and the part leaves after it.
        crowded=pieces.n > 2,
        kernel_s=pieces.attend_s(
            device.backward if backward else device.partial, queries, pieces.most_keys
        ),
        later_s=pieces.touch_s(keys, "add 16 bits to fp32") if backward else 0.0,
        encode_s=pieces.touch_s(rows, "encode"),
        add_s=pieces.touch_s(rows, "decode", "add fp32" if backward else "merge"),
        cast_s=pieces.touch_s(keys, "cast", "cast") if backward else 0.0,
        again=again,
        backward=backward,
    )
    if backward and not again:
        pieces.project(backward=True)


def _rotated_queries_send(message: Messages, rank: int) -> tuple[float, float]:
    """All queries are passed on but those of the rank ahead, which were with it first."""
    q_lengths = message.shape.q_lengths
    _, passed = _mine_and_others(q_lengths, (rank + 1) % message.shape.ranks)
    _, others = _mine_and_others(q_lengths, rank)
    forward, backward = (
        message.queries(passed, backward=each) + message.part(others, backward=each)
        for each in (False, True)
    )
    return forward, backward


def _replicated(pieces: Pieces, backward: bool) -> None:
    """Everyone has all queries; lse is gathered and out summed, or dq."""
    queries, device, timeline = pieces.most_queries, pieces.device, pieces.timeline
    if backward:
        pieces.touch(pieces.of_q(queries), "delta")
    if not backward or pieces.shape.recompute:
        pieces.project()
    pieces.attend(device.backward if backward else device.partial, queries, pieces.most_keys)
    if backward:
        pieces.project(backward=True)
    else:
        timeline.wait(timeline.post(pieces.ranks.gather(pieces.message.statistics(queries))))
        pieces.touch(pieces.of_q(queries), "merge")
    timeline.wait(timeline.post(pieces.ranks.all_reduce(pieces.message.summed(queries))))


def _replicated_sends(message: Messages, rank: int) -> tuple[float, float]:
    """lse to everyone, and an all-reduce of out; in backward one of dq."""
    queries, n = message.shape.q_lengths[rank], message.shape.ranks
    summed = 2 * (n - 1) / n * message.summed(queries)
    return (n - 1) * message.statistics(queries) + summed, summed


def _begin(pieces: Pieces, backward: bool) -> None:
    """What comes before lvx's first transfer: delta, or K and V that are kept."""
    if backward:
        pieces.touch(pieces.of_q(pieces.most_queries), "delta")
    elif not pieces.shape.recompute:
        pieces.project()


# --------------------------------------------------------------------------------------------
# Ring attention and Ulysses


def _rotate_keys(pieces: Pieces, backward: bool) -> None:
    """The next keys travel under each kernel; in backward, so do dk and dv of the last block."""
    device, rows = pieces.device, pieces.of_q(pieces.most_queries)
    keys, nbytes = pieces.of_k_and_v(pieces.mean_keys), pieces.message.keys(pieces.mean_keys)
    merging = pieces.touch_s(rows, "add fp32" if backward else "merge")
    if backward:
        pieces.touch(rows, "delta")
    else:
        pieces.project()
    _rotate(
        pieces,
        ahead_bytes=nbytes,
        home_bytes=nbytes if backward else None,
        # Of two ranks, the gradients leave when the keys have arrived.
        crowded=backward and pieces.n > 2,
        kernel_s=pieces.attend_s(
            device.backward if backward else device.partial, pieces.most_queries, pieces.mean_keys
        ),
        first_s=merging + pieces.touch_s(keys, "cast") if backward else 0.0,
        later_s=merging,
        add_s=pieces.touch_s(keys, "add 16 bits to fp32"),
        backward=backward,
    )
    if backward:
        pieces.touch(keys, "cast")
        pieces.project(backward=True)


def _rotated_keys_send(message: Messages, rank: int) -> tuple[float, float]:
    """k and v go round; in backward dk and dv of all others go home besides."""
    kv_lengths = message.shape.kv_lengths
    _, passed = _mine_and_others(kv_lengths, (rank + 1) % message.shape.ranks)
    _, others = _mine_and_others(kv_lengths, rank)
    return message.keys(passed), message.keys(passed) + message.keys(others)


def _ulysses(pieces: Pieces, backward: bool) -> None:
    """All-to-alls of q, k, v; a kernel over all keys and some heads; one of out; and back."""
    if not backward:
        pieces.project()
    wide = Pieces(padded(pieces.shape), pieces.ranks.cluster, pieces.timeline)
    q, k = wide.of_q(wide.most_queries), wide.of_k_and_v(wide.most_keys) / 2
    arriving, leaving = ([q], [q, k, k]) if backward else ([q, k, k], [q])

    def all_to_all(numbers: float) -> None:
        wide.touch(numbers, "around an all-to-all")
        nbytes = numbers * wide.shape.element_bytes / wide.n
        wide.timeline.wait(wide.timeline.post(wide.ranks.exchange(nbytes)))

    for numbers in arriving:
        all_to_all(numbers)
    if backward:
        wide.touch(q, "delta")
    kernel = wide.device.backward if backward else wide.device.whole
    wide.attend(kernel, wide.queries, wide.keys, share=1 / wide.n)
    for numbers in leaving:
        all_to_all(numbers)
    if backward:
        pieces.project(backward=True)


def _ulysses_sends(message: Messages, rank: int) -> tuple[float, float]:
    """All-to-alls of q, k, v and out; in backward of their gradients."""
    shape = padded(message.shape)
    message = Messages(shape)
    whole = 2 * message.rows(shape.q_lengths[rank]) + message.keys(shape.kv_lengths[rank])
    each = (shape.ranks - 1) / shape.ranks * whole
    return each, each


# --------------------------------------------------------------------------------------------
# What rotates


def _rotate(
    pieces: Pieces,
    *,
    ahead_bytes: float,
    home_bytes: float | None,
    crowded: bool,
    kernel_s: float,
    first_s: float = 0.0,
    later_s: float = 0.0,
    encode_s: float = 0.0,
    add_s: float = 0.0,
    cast_s: float = 0.0,
    backward: bool,
    again: bool = False,
) -> None:
    """A ring's turns.

    Args:
        pieces: of the call.
        ahead_bytes: passed on under each kernel.
        home_bytes: of what the last kernel gave for another rank; None where it stays.
        crowded: both are under way at the same time.
        kernel_s: of each block.
        first_s, later_s: after the kernel on what is this rank's own, and after the others.
        encode_s, add_s: of a part before it leaves, and after it arrived.
        cast_s: at the end.
        backward, again: K and V are projected under the first transfer; backward under the last.
    """
    timeline, n, per_node = pieces.timeline, pieces.n, pieces.ranks.per_node
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
    if backward and again:
        pieces.project(backward=True)
    if returning is not None:
        timeline.wait(returning)
        timeline.compute(add_s, "other")


def _mine_and_others(lengths: tuple[int, ...], rank: int) -> tuple[int, int]:
    return lengths[rank], sum(lengths) - lengths[rank]


class Way(NamedTuple):
    """One way of attending to what is split.

    Attributes:
        walk: spends a pass on the timeline of its pieces; True is backward.
        sends: bytes of a rank in forward and in backward, by its messages and its number.
        rule: whose part of the rule a bare operator gathers before its forward: ``q`` and ``kv``.
    """

    walk: Callable[[Pieces, bool], None]
    sends: Callable[[Messages, int], tuple[float, float]] = lambda message, rank: (0, 0)
    rule: tuple[str, ...] = ()


WAYS = {
    "lvx ring": Way(_rotate_queries, _rotated_queries_send, ("q",)),
    "lvx gather": Way(_gather, _gather_sends, ("q",)),
    "lvx replicated": Way(_replicated, _replicated_sends),
    "ring": Way(_rotate_keys, _rotated_keys_send, ("kv",)),
    "ulysses": Way(_ulysses, _ulysses_sends, ("q", "kv")),
    "none": Way(_alone),
}
"""By method, and schedule of lvx."""


def way_of(shape: AttentionShape, method: str, schedule: str) -> Way:
    """The way that a call takes; a rank by itself attends alone."""
    alone = method == "none" or shape.ranks == 1
    return WAYS["none" if alone else f"lvx {schedule}" if method == "lvx" else method]
