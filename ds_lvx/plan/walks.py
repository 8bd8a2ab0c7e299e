"""How a rank spends a forward or a backward, by method and schedule: walks through the code.

A walk says what the rank computes and what its link carries at the same time. What rotates counts
with its mean length, because each rank meets every shard once; what stays, with the longest.
docs/planning.md has the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ds_lvx.attention.messages import padded
from ds_lvx.plan.pieces import Pieces
from ds_lvx.plan.transfers import Timeline, Transfer


def _alone(pieces: Pieces, timeline: Timeline, *, backward: bool) -> None:
    """All queries and keys on one rank, whose neighbours are idle."""
    device, keys = pieces.device, pieces.keys
    kernel = device.whole_alone or device.whole
    if backward:
        kernel = device.backward_alone or device.backward
        delta = pieces.touch_s(pieces.of_q(pieces.queries), "delta")
        timeline.compute(device.alone * delta, "other")
    if not backward or pieces.shape.recompute:
        timeline.compute(device.alone * pieces.project_s(keys), "projection")
    timeline.compute(pieces.attend_s(kernel, pieces.queries, keys), "kernel")
    if backward:
        timeline.compute(device.alone * pieces.project_s(keys, backward=True), "projection")


# --------------------------------------------------------------------------------------------
# lvx: a walk through ds_lvx.attention.schedules


def _gather(pieces: Pieces, timeline: Timeline, *, backward: bool) -> None:
    """All queries arrive, one kernel, the parts go home; a group of heads after the other."""
    shares, again = pieces.head_shares, pieces.shape.recompute
    copies = ("copy", "copy") if backward else ("copy",)
    mine, everyone = pieces.of_q(pieces.most_queries), pieces.of_q(pieces.queries)
    out = pieces.message.queries(pieces.most_queries, backward=backward)
    part = pieces.message.part(pieces.most_queries, backward=backward)
    kernel = pieces.device.backward if backward else pieces.device.partial
    _begin(pieces, timeline, pieces.most_queries, backward=backward)
    timeline.compute(pieces.touch_s(shares[0] * mine, *copies), "other")
    arrives = timeline.post(pieces.ranks.gather(shares[0] * out))
    if again:
        _project(pieces, timeline)
    returning = []
    for share, following in zip(shares, (*shares[1:], 0.0), strict=True):
        timeline.wait(arrives)
        if following:
            timeline.compute(pieces.touch_s(following * mine, *copies), "other")
            arrives = timeline.post(pieces.ranks.gather(following * out))
        timeline.compute(pieces.touch_s(share * everyone, *copies), "other")
        attending = pieces.attend_s(kernel, pieces.queries, pieces.most_keys, share=share)
        timeline.compute(attending, "kernel")
        timeline.compute(pieces.touch_s(share * everyone, "encode", "copy"), "other")
        returning.append(timeline.post(pieces.ranks.exchange(share * part)))
    if backward and len(shares) > 1:
        timeline.compute(pieces.touch_s(pieces.of_k_and_v(pieces.most_keys), "copy"), "other")
    if backward and again:
        _project(pieces, timeline, backward=True)
    for share, arrives in zip(shares, returning, strict=True):
        timeline.wait(arrives)
        adding = "sum stacked" if backward else "merge stacked"
        timeline.compute(pieces.touch_s(pieces.n * share * mine, "decode", adding), "other")
    if backward and not again:
        _project(pieces, timeline, backward=True)


def _rotate_queries(pieces: Pieces, timeline: Timeline, *, backward: bool) -> None:
    """The next queries and the last part travel under each kernel; dk and dv add up in fp32."""
    device, again, queries = pieces.device, pieces.shape.recompute, pieces.mean_queries
    rows, keys = pieces.of_q(queries), pieces.of_k_and_v(pieces.most_keys)
    kernel = device.backward if backward else device.partial
    _begin(pieces, timeline, pieces.most_queries, backward=backward)
    _rotate(
        pieces,
        timeline,
        _Turns(
            ahead_bytes=pieces.message.queries(queries, backward=backward),
            home_bytes=pieces.message.part(queries, backward=backward),
            # Two ranks have one step, and the part leaves after it.
            crowded=pieces.n > 2,
            kernel_s=pieces.attend_s(kernel, queries, pieces.most_keys),
            later_s=pieces.touch_s(keys, "add 16 bits to fp32") if backward else 0.0,
            encode_s=pieces.touch_s(rows, "encode"),
            add_s=pieces.touch_s(rows, "decode", "add fp32" if backward else "merge"),
            cast_s=pieces.touch_s(keys, "cast", "cast") if backward else 0.0,
        ),
        again=again,
        backward=backward,
    )
    if backward and not again:
        _project(pieces, timeline, backward=True)


def _replicated(pieces: Pieces, timeline: Timeline, *, backward: bool) -> None:
    """Everyone has all queries; lse is gathered and out summed, or dq."""
    queries, device = pieces.most_queries, pieces.device
    if backward:
        timeline.compute(pieces.touch_s(pieces.of_q(queries), "delta"), "other")
    if not backward or pieces.shape.recompute:
        _project(pieces, timeline)
    kernel = device.backward if backward else device.partial
    timeline.compute(pieces.attend_s(kernel, queries, pieces.most_keys), "kernel")
    if backward:
        _project(pieces, timeline, backward=True)
    else:
        timeline.wait(timeline.post(pieces.ranks.gather(pieces.message.statistics(queries))))
        timeline.compute(pieces.touch_s(pieces.of_q(queries), "merge"), "other")
    timeline.wait(timeline.post(pieces.ranks.all_reduce(pieces.message.summed(queries))))


# --------------------------------------------------------------------------------------------
# Ring attention and Ulysses


def _rotate_keys(pieces: Pieces, timeline: Timeline, *, backward: bool) -> None:
    """The next keys travel under each kernel; in backward, so do dk and dv of the last block."""
    device, rows = pieces.device, pieces.of_q(pieces.most_queries)
    keys, nbytes = pieces.of_k_and_v(pieces.mean_keys), pieces.message.keys(pieces.mean_keys)
    kernel = device.backward if backward else device.partial
    merging = pieces.touch_s(rows, "add fp32" if backward else "merge")
    cast = pieces.touch_s(keys, "cast") if backward else 0.0
    if backward:
        timeline.compute(pieces.touch_s(rows, "delta"), "other")
    else:
        _project(pieces, timeline)
    _rotate(
        pieces,
        timeline,
        _Turns(
            ahead_bytes=nbytes,
            home_bytes=nbytes if backward else None,
            # Of two ranks, the gradients leave when the keys have arrived.
            crowded=backward and pieces.n > 2,
            kernel_s=pieces.attend_s(kernel, pieces.most_queries, pieces.mean_keys),
            first_s=merging + cast if backward else 0.0,
            later_s=merging,
            add_s=pieces.touch_s(keys, "add 16 bits to fp32"),
        ),
        backward=backward,
    )
    if backward:
        timeline.compute(cast, "other")
        _project(pieces, timeline, backward=True)


def _ulysses(pieces: Pieces, timeline: Timeline, *, backward: bool) -> None:
    """All-to-alls of q, k, v; a kernel over all keys and some heads; one of out; and back."""
    if not backward:
        _project(pieces, timeline)
    wide = Pieces(padded(pieces.shape), pieces.ranks.cluster)
    rows, k_and_v = wide.of_q(wide.most_queries), wide.of_k_and_v(wide.most_keys)
    arriving = [rows] if backward else [rows, k_and_v / 2, k_and_v / 2]
    leaving = [rows, k_and_v / 2, k_and_v / 2] if backward else [rows]
    kernel = wide.device.backward if backward else wide.device.whole

    def all_to_all(numbers: float) -> None:
        timeline.compute(wide.touch_s(numbers, "around an all-to-all"), "other")
        nbytes = numbers * wide.shape.element_bytes / wide.n
        timeline.wait(timeline.post(wide.ranks.exchange(nbytes)))

    for numbers in arriving:
        all_to_all(numbers)
    if backward:
        timeline.compute(wide.touch_s(rows, "delta"), "other")
    attending = wide.attend_s(kernel, wide.queries, wide.keys, share=1 / wide.n)
    timeline.compute(attending, "kernel")
    for numbers in leaving:
        all_to_all(numbers)
    if backward:
        _project(pieces, timeline, backward=True)


# --------------------------------------------------------------------------------------------
# What walks share


@dataclass(frozen=True)
class _Turns:
    """What a rank does while something rotates.

    Attributes:
        ahead_bytes: passed on under each kernel.
        home_bytes: of what the last kernel gave for another rank; None where it stays.
        crowded: both are under way at the same time.
        kernel_s: of each block.
        first_s, later_s: after the kernel on what is this rank's own, and after the others.
        encode_s, add_s: of a part before it leaves, and after it arrived.
        cast_s: at the end.
    """

    ahead_bytes: float
    home_bytes: float | None
    crowded: bool
    kernel_s: float
    first_s: float = 0.0
    later_s: float = 0.0
    encode_s: float = 0.0
    add_s: float = 0.0
    cast_s: float = 0.0


def _rotate(
    pieces: Pieces, timeline: Timeline, turns: _Turns, *, backward: bool, again: bool = False
) -> None:
    """``again``: K and V are projected under the first transfer, and backward under the last."""
    ahead: Transfer = pieces.ranks.shift(turns.ahead_bytes, crowded=turns.crowded)
    returning: float | None = None
    for step in range(pieces.n):
        following = timeline.post(ahead) if step < pieces.n - 1 else None
        if step == 0 and again:
            _project(pieces, timeline)
        timeline.compute(turns.kernel_s, "kernel")
        timeline.compute(turns.later_s if step else turns.first_s, "other")
        if step and turns.home_bytes is not None:
            if returning is not None:
                timeline.wait(returning)
                timeline.compute(turns.add_s, "other")
            timeline.compute(turns.encode_s, "other")
            home = pieces.ranks.shift(turns.home_bytes, hops=-step, crowded=turns.crowded)
            returning = timeline.post(home)
        if following is not None:
            timeline.wait(following)
    timeline.compute(turns.cast_s, "other")
    if backward and again:
        _project(pieces, timeline, backward=True)
    if returning is not None:
        timeline.wait(returning)
        timeline.compute(turns.add_s, "other")


def _begin(pieces: Pieces, timeline: Timeline, queries: float, *, backward: bool) -> None:
    """What comes before lvx's first transfer: delta, or K and V that are kept."""
    if backward:
        timeline.compute(pieces.touch_s(pieces.of_q(queries), "delta"), "other")
    elif not pieces.shape.recompute:
        _project(pieces, timeline)


def _project(pieces: Pieces, timeline: Timeline, *, backward: bool = False) -> None:
    seconds = pieces.project_s(pieces.most_keys, backward=backward)
    timeline.compute(seconds, "projection")


class Walk(Protocol):
    """Spends a pass of a call on a timeline."""

    def __call__(self, pieces: Pieces, timeline: Timeline, *, backward: bool) -> None: ...


WALKS: dict[str, Walk] = {
    "none": _alone,
    "lvx gather": _gather,
    "lvx ring": _rotate_queries,
    "lvx replicated": _replicated,
    "ring": _rotate_keys,
    "ulysses": _ulysses,
}
