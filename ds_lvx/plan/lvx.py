"""How a rank spends a pass of lvx, by schedule: a walk through `ds_lvx.attention.schedules`.

A walk says what the rank computes and what its link carries at the same time. What rotates counts
with its mean length, because each rank meets every shard once; what stays, with the longest.
docs/planning.md has the formulas.
"""

from __future__ import annotations

from ds_lvx.plan.transfers import Timeline
from ds_lvx.plan.work import (
    ADD_16_TO_FP32,
    ADD_FP32,
    CAST,
    COPY,
    DECODE,
    DELTA,
    ENCODE,
    FP32_BYTES,
    MERGE,
    MERGE_STACKED,
    SUM_STACKED,
    Work,
)


def prepare(work: Work, timeline: Timeline, *, backward: bool = False) -> None:
    """K and V are made, unless backward still has them."""
    if not backward or work.shape.recompute:
        timeline.compute(work.projection(work.most_keys), "projection")


def finish(work: Work, timeline: Timeline) -> None:
    """dk and dv go back through the projection."""
    timeline.compute(work.projection(work.most_keys, backward=True), "projection")


def _query_bytes(work: Work, queries: float, *, backward: bool) -> float:
    """Without the visibility."""
    tensors, statistics = (2, 2) if backward else (1, 0)
    return tensors * work.sent(work.rows(queries)) + statistics * work.statistics(queries)


def _gather(work: Work, timeline: Timeline, *, backward: bool) -> None:
    """All queries arrive, one kernel, the parts go home; a group of heads after the other."""
    shares = work.head_shares
    copies = (COPY, COPY) if backward else (COPY,)
    mine, everyone = work.rows(work.most_queries), work.rows(work.queries)
    sent = _query_bytes(work, work.most_queries, backward=backward)
    part = work.sent(mine) + (0.0 if backward else work.statistics(work.most_queries))
    kernel = work.device.backward if backward else work.device.partial
    timeline.compute(work.touch(shares[0] * mine, *copies), "other")
    ranges = work.ranges(work.most_queries)
    arrives = timeline.post(work.ranks.gather(shares[0] * sent + ranges))
    if work.shape.recompute:
        prepare(work, timeline, backward=backward)
    returning = []
    for share, following in zip(shares, (*shares[1:], 0.0), strict=True):
        timeline.wait(arrives)
        if following:
            timeline.compute(work.touch(following * mine, *copies), "other")
            arrives = timeline.post(work.ranks.gather(following * sent))
        timeline.compute(work.touch(share * everyone, *copies), "other")
        attending = work.attend(kernel, work.queries, work.most_keys, share=share)
        timeline.compute(attending, "kernel")
        timeline.compute(work.touch(share * everyone, ENCODE, COPY), "other")
        returning.append(timeline.post(work.ranks.exchange(share * part)))
    if backward and len(shares) > 1:
        timeline.compute(work.touch(2 * work.numbers(work.most_keys), COPY), "other")
    if backward and work.shape.recompute:
        finish(work, timeline)
    for share, arrives in zip(shares, returning, strict=True):
        timeline.wait(arrives)
        adding = SUM_STACKED if backward else MERGE_STACKED
        timeline.compute(work.touch(work.n * share * mine, DECODE, adding), "other")


def gather_forward(work: Work, timeline: Timeline) -> None:
    """Queries come together, parts go home."""
    if not work.shape.recompute:
        prepare(work, timeline)
    _gather(work, timeline, backward=False)


def gather_backward(work: Work, timeline: Timeline) -> None:
    """The same with dout, lse and delta; dq goes home."""
    timeline.compute(work.touch(work.rows(work.most_queries), DELTA), "other")
    _gather(work, timeline, backward=True)
    if not work.shape.recompute:
        finish(work, timeline)


def _rotate_queries(work: Work, timeline: Timeline, *, backward: bool) -> None:
    """The ring of lvx: the next queries and the last part travel under each kernel."""
    device, ranks, n = work.device, work.ranks, work.n
    rows = work.rows(work.mean_queries)
    sent = _query_bytes(work, work.mean_queries, backward=backward) + work.ranges(work.mean_queries)
    crowded = n > 2  # two ranks have one step, and the part leaves after it
    queries = ranks.shift(sent, crowded=crowded)
    lse = 0.0 if backward else work.statistics(work.mean_queries)
    part_bytes = work.sent(rows) + lse
    kernel = device.backward if backward else device.partial
    attending = work.attend(kernel, work.mean_queries, work.most_keys)
    adding = work.touch(rows, DECODE, ADD_FP32 if backward else MERGE)
    encoding = work.touch(rows, ENCODE)
    dk_dv = work.touch(2 * work.numbers(work.most_keys), ADD_16_TO_FP32) if backward else 0.0
    returning: float | None = None
    for step in range(n):
        following = timeline.post(queries) if step < n - 1 else None
        if step == 0 and work.shape.recompute:
            prepare(work, timeline, backward=backward)
        timeline.compute(attending, "kernel")
        if step > 0:
            timeline.compute(dk_dv, "other")
            if returning is not None:
                timeline.wait(returning)
                timeline.compute(adding, "other")
            timeline.compute(encoding, "other")
            returning = timeline.post(ranks.shift(part_bytes, hops=-step, crowded=crowded))
        if following is not None:
            timeline.wait(following)
    if backward:
        timeline.compute(work.touch(2 * work.numbers(work.most_keys), CAST, CAST), "other")
        if work.shape.recompute:
            finish(work, timeline)
    if returning is not None:
        timeline.wait(returning)
        timeline.compute(adding, "other")


def ring_forward(work: Work, timeline: Timeline) -> None:
    """Queries rotate, parts go straight home."""
    if not work.shape.recompute:
        prepare(work, timeline)
    _rotate_queries(work, timeline, backward=False)


def ring_backward(work: Work, timeline: Timeline) -> None:
    """The same with dout, lse and delta; dk and dv add up in fp32."""
    timeline.compute(work.touch(work.rows(work.most_queries), DELTA), "other")
    _rotate_queries(work, timeline, backward=True)
    if not work.shape.recompute:
        finish(work, timeline)


def replicated_forward(work: Work, timeline: Timeline) -> None:
    """Everyone has all queries; lse is gathered, out is summed."""
    queries = work.most_queries
    prepare(work, timeline)
    timeline.compute(work.attend(work.device.partial, queries, work.most_keys), "kernel")
    timeline.wait(timeline.post(work.ranks.gather(work.statistics(queries))))
    timeline.compute(work.touch(work.rows(queries), MERGE), "other")
    timeline.wait(timeline.post(work.ranks.all_reduce(FP32_BYTES * work.rows(queries))))


def replicated_backward(work: Work, timeline: Timeline) -> None:
    """dq is summed."""
    queries = work.most_queries
    timeline.compute(work.touch(work.rows(queries), DELTA), "other")
    prepare(work, timeline, backward=True)
    timeline.compute(work.attend(work.device.backward, queries, work.most_keys), "kernel")
    finish(work, timeline)
    timeline.wait(timeline.post(work.ranks.all_reduce(FP32_BYTES * work.rows(queries))))
