"""From the samples of a calibration to the numbers of a `Cluster`.

A sample is the time of the slowest rank; of each list of samples the median counts. Of transfers it
is the lower quartile: two that begin in the same instant, as those of a calibration do and those of
a step do not, can get in each other's way and take twice as long. The terms of a kernel's time and
of a link's are fitted by least squares of the relative error, none below zero.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from ds_lvx.plan.cluster import Device, KernelTime, Link, Wire

KINDS = ("whole", "partial", "backward")


def slowest(answers: Sequence[Any]) -> float:
    """The median over repeats of the slowest rank's seconds."""
    return statistics.median(max(each) for each in zip(*answers, strict=True))


def undisturbed(answers: Sequence[Any]) -> float:
    """The lower quartile over repeats of the slowest rank's seconds."""
    return float(np.quantile([max(each) for each in zip(*answers, strict=True)], 0.25))


def kernel_time(
    shapes: Sequence[Mapping[str, int]],
    seconds: Sequence[float],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> KernelTime:
    """A kernel's terms, and what they miss at each shape."""
    width, kv_width = heads * head_dim, kv_heads * head_dim
    lengths = [(shape["seqlen_q"], shape["seqlen_kv"]) for shape in shapes]
    columns = [
        (1.0, float(s * t * width), float(t * kv_width), float(s * width)) for s, t in lengths
    ]
    call_s, pair_s, key_s, row_s = not_negative(columns, seconds)
    terms = KernelTime(call_s, pair_s, key_s, row_s)
    ratios = tuple(
        (
            float(s),
            float(t * kv_width),
            measured / terms.seconds(s, t, width=width, kv_width=kv_width),
        )
        for (s, t), measured in zip(lengths, seconds, strict=True)
    )
    return replace(terms, ratios=ratios)


def wire(nbytes: Sequence[float], seconds: Sequence[float]) -> Wire:
    """A link's latency, the rate of its largest transfers, and what lies between.

    Args:
        nbytes: ascending; the first is next to nothing.
        seconds: of each.
    """
    latency_s = seconds[0]
    points: list[tuple[float, float]] = []
    slowest = 0.0
    for size, each in zip(nbytes[1:], seconds[1:], strict=True):
        slowest = max(slowest, each - latency_s)  # more bytes never take less: that is noise
        points.append((size, slowest))
    (begin, begun), (end, ended) = [(nbytes[0], 0.0), *points][-2:]
    rate = (end - begin) / (ended - begun) if ended > begun else nbytes[-1] / seconds[-1]
    return Wire(rate, latency_s, tuple(points))


def not_negative(columns: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """The factors of ``columns`` that give ``seconds`` with the least relative error.

    All sets of columns are tried, as there are few: the best one whose factors are positive stands,
    and the rest is 0.
    """
    weighted = np.asarray(columns, dtype=float) / np.asarray(seconds)[:, None]
    width = weighted.shape[1]
    best, least = [0.0] * width, float("inf")
    for size in range(1, width + 1):
        for chosen in combinations(range(width), size):
            some = weighted[:, chosen]
            # Columns differ by many orders of magnitude.
            scale = np.abs(some).max(axis=0)
            factors = np.linalg.lstsq(some / scale, np.ones(len(some)), rcond=None)[0] / scale
            error = float(((some @ factors - 1) ** 2).sum())
            if (factors >= 0).all() and error < least * (1 - 1e-9):
                least, best = error, [0.0] * width
                for column, factor in zip(chosen, factors, strict=True):
                    best[column] = float(factor)
    return best


def device(
    answers: Sequence[Mapping[str, Any]], request: Mapping[str, Any], *, memory_bytes: int
) -> Device:
    """The device of a calibration's answers, by rank."""
    heads = {name: request[name] for name in ("heads", "kv_heads", "head_dim")}
    kernels = {kind: kernel_time(*_of_kernels(answers, kind), **heads) for kind in KINDS}
    alone = {
        kind: kernel_time(*_of_kernels(answers[:1], f"{kind}_alone"), **heads)
        for kind in ("whole", "backward")
    }
    elementwise, matmul, operation = (
        answers[0][name] for name in ("elementwise", "matmul", "operation")
    )
    seconds = {
        name: slowest([answer[name]["seconds"] for answer in answers])
        for name in ("elementwise", "matmul", "operation", "call")
    }
    # A call is a forward and a backward; their kernels are counted by themselves.
    own = seconds["call"] - sum(_of_kernels(answers, kind)[1][0] for kind in ("whole", "backward"))
    numbers = elementwise["numbers"] * elementwise["bytes_per_number"]
    return Device(
        name=answers[0]["device"],
        memory_bytes=memory_bytes,
        whole=kernels["whole"],
        partial=kernels["partial"],
        backward=kernels["backward"],
        matmul_flops=2 * matmul["side"] ** 3 / seconds["matmul"],
        stream_bytes_per_s=numbers / seconds["elementwise"],
        operation_s=seconds["operation"] / operation["operations"],
        call_s=max(own / 2, 0.0),
        whole_alone=alone["whole"],
        backward_alone=alone["backward"],
        alone=_alone(answers),
    )


def link(answers: Sequence[Mapping[str, Any]]) -> Link:
    """The links of a calibration's answers: a hop of each kind of transfer."""
    others = len(answers) - 1
    times = {"shift": 1, "gather": others, "exchange": others, "shifts": 2}
    transfers = {kind: _of_transfers(answers, kind, each) for kind, each in times.items()}
    nbytes, seconds = transfers["shifts"]  # as many pairs as there are other ranks
    transfers["shifts"] = nbytes, [each / others for each in seconds]
    wires = {kind: wire(*each) for kind, each in transfers.items()}
    gather, exchange = wires["gather"], wires["exchange"]
    # Of an all-gather every hop has its latency; of an all-to-all, what the first message's does
    # not explain is for each peer.
    beyond = max(exchange.latency_s - wires["shift"].latency_s, 0.0)
    return Link(
        shift=wires["shift"],
        gather=replace(gather, latency_s=gather.latency_s / others),
        exchange=replace(exchange, latency_s=beyond / others),
        shifts=wires["shifts"],
        drag_s=_drag(answers),
        processor_s=_processor(answers),
    )


def _processor(answers: Sequence[Mapping[str, Any]]) -> float:
    """Of a rank's time, what a byte takes that it sends: by the largest shift.

    The clock is the processor's, and ranks that share a core wait for each other besides.
    """
    if not answers[0]["device"].startswith("cpu"):
        return 0.0
    largest = [answer["transfers"]["shift"][-1] for answer in answers]
    seconds = statistics.median(
        statistics.fmean(each)
        for each in zip(*(r["processor_seconds"] for r in largest), strict=True)
    )
    return float(seconds / largest[0]["bytes"] / _alone(answers))


def _drag(answers: Sequence[Mapping[str, Any]]) -> float:
    """What one of two small shifts costs the kernel above it.

    Of large ones nothing can be said: their transfer may itself take longer than the kernel.
    """
    first = [answer["hidden"][0] for answer in answers]
    kernel, shifts, both = (
        slowest([each[name] for each in first]) for name in ("kernel", "shifts", "both")
    )
    return max(both - max(kernel, shifts), 0.0) / 2


def _of_kernels(
    answers: Sequence[Mapping[str, Any]], kind: str
) -> tuple[list[dict[str, int]], list[float]]:
    records = [answer["kernels"][kind] for answer in answers]
    shapes = [{name: each[name] for name in ("seqlen_q", "seqlen_kv")} for each in records[0]]
    return shapes, [slowest([r["seconds"] for r in each]) for each in zip(*records, strict=True)]


def _of_transfers(
    answers: Sequence[Mapping[str, Any]], kind: str, times: int
) -> tuple[list[float], list[float]]:
    """Bytes that a rank sends, and seconds."""
    records = [answer["transfers"][kind] for answer in answers]
    nbytes = [float(times * each["bytes"]) for each in records[0]]
    seconds = [[record["seconds"] for record in each] for each in zip(*records, strict=True)]
    return nbytes, [undisturbed(each) for each in seconds]


def _alone(answers: Sequence[Mapping[str, Any]]) -> float:
    """What share of the time a kernel takes on rank 0 while all others wait."""
    (_, together), (_, alone) = (
        _of_kernels(answers, "whole"),
        _of_kernels(answers[:1], "whole_alone"),
    )
    shares = [one / other for one, other in zip(alone, together, strict=True)]
    return min(statistics.median(shares), 1.0)
