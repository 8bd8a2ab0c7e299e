"""How a rank spends a pass of ring attention, of Ulysses, or alone; as `ds_lvx.plan.lvx`."""

from __future__ import annotations

from dataclasses import replace

from ds_lvx.attention.shape import head_layout
from ds_lvx.plan.lvx import finish, prepare
from ds_lvx.plan.transfers import Timeline
from ds_lvx.plan.work import (
    ADD_16_TO_FP32,
    ADD_FP32,
    CAST,
    DELTA,
    MERGE,
    Work,
)

_ULYSSES_COPIES = (8, 2)  # before and after an all-to-all


def alone_forward(work: Work, timeline: Timeline) -> None:
    """All queries and keys on one rank, whose neighbours are idle."""
    share, kernel = work.device.alone, work.device.whole_alone or work.device.whole
    timeline.compute(share * work.projection(work.keys), "projection")
    timeline.compute(work.attend(kernel, work.queries, work.keys), "kernel")


def alone_backward(work: Work, timeline: Timeline) -> None:
    """The same."""
    share, kernel = work.device.alone, work.device.backward_alone or work.device.backward
    timeline.compute(share * work.touch(work.rows(work.queries), DELTA), "other")
    if work.shape.recompute:
        timeline.compute(share * work.projection(work.keys), "projection")
    timeline.compute(work.attend(kernel, work.queries, work.keys), "kernel")
    timeline.compute(share * work.projection(work.keys, backward=True), "projection")


# --------------------------------------------------------------------------------------------
# Ring attention: K and V rotate


def ring_forward(work: Work, timeline: Timeline) -> None:
    """The next keys travel under each kernel."""
    rows = work.rows(work.most_queries)
    keys = work.numbers(work.mean_keys)
    transfer = work.ranks.shift(work.sent(2 * keys) + work.positions(work.mean_keys))
    attending = work.attend(work.device.partial, work.most_queries, work.mean_keys)
    prepare(work, timeline)
    for step in range(work.n):
        following = timeline.post(transfer) if step < work.n - 1 else None
        timeline.compute(attending, "kernel")
        if step > 0:
            timeline.compute(work.touch(rows, MERGE), "other")
        if following is not None:
            timeline.wait(following)


def ring_backward(work: Work, timeline: Timeline) -> None:
    """The next keys, and dk and dv of the last block, travel under each kernel."""
    rows = work.rows(work.most_queries)
    keys = 2 * work.numbers(work.mean_keys)  # of k and v, or of dk and dv
    sent = work.sent(keys) + work.positions(work.mean_keys)
    crowded = work.n > 2  # of two ranks, the gradients leave when the keys have arrived
    transfer = work.ranks.shift(sent, crowded=crowded)
    attending = work.attend(work.device.backward, work.most_queries, work.mean_keys)
    adding = work.touch(keys, ADD_16_TO_FP32)
    timeline.compute(work.touch(rows, DELTA), "other")
    returning: float | None = None
    for step in range(work.n):
        following = timeline.post(transfer) if step < work.n - 1 else None
        timeline.compute(attending, "kernel")
        timeline.compute(work.touch(rows, ADD_FP32), "other")
        if step == 0:
            timeline.compute(work.touch(keys, CAST), "other")
        else:
            if returning is not None:
                timeline.wait(returning)
                timeline.compute(adding, "other")
            gradients = work.ranks.shift(work.sent(keys), hops=-step, crowded=crowded)
            returning = timeline.post(gradients)
        if following is not None:
            timeline.wait(following)
    if returning is not None:
        timeline.wait(returning)
        timeline.compute(adding, "other")
    timeline.compute(work.touch(keys, CAST), "other")
    finish(work, timeline)


# --------------------------------------------------------------------------------------------
# Ulysses: all-to-alls over the heads


def _padded(work: Work) -> Work:
    """The same call with shards and heads as Ulysses pads them."""
    shape = work.shape
    repeats, padding = head_layout(shape.heads, shape.kv_heads, work.n)
    kv_heads = shape.kv_heads * repeats + padding
    heads = shape.heads + padding * (shape.heads // (shape.kv_heads * repeats))
    padded = replace(
        shape,
        q_lengths=(work.most_queries,) * work.n,
        kv_lengths=(work.most_keys,) * work.n,
        heads=heads,
        kv_heads=kv_heads,
    )
    return Work(padded, work.ranks.cluster)


def _all_to_all(work: Work, timeline: Timeline, numbers: float) -> None:
    timeline.compute(work.touch(numbers, _ULYSSES_COPIES), "other")
    timeline.wait(timeline.post(work.ranks.exchange(work.sent(numbers) / work.n)))


def ulysses_forward(work: Work, timeline: Timeline) -> None:
    """All-to-alls of q, k, v; a kernel over all keys and some heads; one of out."""
    prepare(work, timeline)
    work = _padded(work)
    if work.shape.visibility:
        # Ranges and positions of everyone, once.
        own = work.ranges(work.most_queries) + work.positions(work.most_keys)
        timeline.wait(timeline.post(work.ranks.gather(own)))
    rows, keys = work.rows(work.most_queries), work.numbers(work.most_keys)
    for numbers in (rows, keys, keys):
        _all_to_all(work, timeline, numbers)
    whole = work.device.whole
    attending = work.attend(whole, work.queries, work.keys, share=1 / work.n)
    timeline.compute(attending, "kernel")
    _all_to_all(work, timeline, rows)


def ulysses_backward(work: Work, timeline: Timeline) -> None:
    """An all-to-all of dout; the kernel; all-to-alls of dq, dk, dv."""
    padded = _padded(work)
    rows, keys = padded.rows(padded.most_queries), padded.numbers(padded.most_keys)
    _all_to_all(padded, timeline, rows)
    timeline.compute(padded.touch(rows, DELTA), "other")
    backward = padded.device.backward
    attending = padded.attend(backward, padded.queries, padded.keys, share=1 / padded.n)
    timeline.compute(attending, "kernel")
    for numbers in (rows, keys, keys):
        _all_to_all(padded, timeline, numbers)
    finish(work, timeline)
