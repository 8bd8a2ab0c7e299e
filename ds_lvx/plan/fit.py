"""From the samples of a calibration to the numbers of a `Cluster`.

A sample is the time of the slowest rank; of each list of samples the median counts. Of transfers it
is the lower quartile: two that begin in the same instant, as those of a calibration do and those of
a step do not, can get in each other's way and take twice as long. The terms of a kernel's time and
of a link's are fitted by least squares of the relative error, none below zero.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np

from ds_lvx.plan.cluster import Device, KernelTime, Link, Wire

Answers: TypeAlias = Sequence[Mapping[str, Any]]
"""What `ds_lvx.plan.measure` found, by rank."""
_BYTES = {"float32": 4, "bfloat16": 2}


def slowest(
    records: Iterable[Mapping[str, Any]], name: str = "seconds", *, at: float = 0.5
) -> float:
    """The median over repeats, or another quantile, of the slowest rank's time; records by rank."""
    return float(np.quantile(np.max([each[name] for each in records], axis=0), at))


def kernel_time(
    shapes: Sequence[Mapping[str, Any]],
    seconds: Sequence[float],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> KernelTime:
    """A kernel's terms, and what they miss at each shape."""
    width, kv_width = heads * head_dim, kv_heads * head_dim
    lengths = [(float(shape["seqlen_q"]), float(shape["seqlen_kv"])) for shape in shapes]
    columns = [(1.0, s * t * width, t * kv_width, s * width) for s, t in lengths]
    call_s, pair_s, key_s, row_s = not_negative(columns, seconds)
    terms = KernelTime(call_s, pair_s, key_s, row_s)
    ratios = (
        (s, t * kv_width, measured / terms.seconds(s, t, width=width, kv_width=kv_width))
        for (s, t), measured in zip(lengths, seconds, strict=True)
    )
    return replace(terms, ratios=tuple(ratios))


def wire(nbytes: Sequence[float], seconds: Sequence[float]) -> Wire:
    """A link's latency, the rate of its largest transfers, and what lies between.

    The bytes are ascending; the first are next to nothing.
    """
    latency_s = seconds[0]
    busy = np.maximum.accumulate(seconds) - latency_s  # more bytes never take less: that is noise
    points = tuple(zip(nbytes[1:], map(float, busy[1:]), strict=True))
    (begin, begun), (end, ended) = ((nbytes[0], 0.0), *points)[-2:]
    rate = (end - begin) / (ended - begun) if ended > begun else nbytes[-1] / seconds[-1]
    return Wire(rate, latency_s, points)


def not_negative(columns: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """The factors of ``columns`` that give ``seconds`` with the least relative error.

    All sets of columns are tried, as there are few: the best one whose factors are positive stands,
    and the rest is 0.
    """
    weighted = np.asarray(columns, dtype=float) / np.asarray(seconds)[:, None]
    weighted /= (scale := np.abs(weighted).max(axis=0))  # by many orders of magnitude
    width, ones = weighted.shape[1], np.ones(len(seconds))
    best, least = np.zeros(width), float("inf")
    for size in range(1, width + 1):
        for chosen in map(list, combinations(range(width), size)):
            factors = np.zeros(width)
            factors[chosen] = np.linalg.lstsq(weighted[:, chosen], ones, rcond=None)[0]
            error = float(((weighted @ factors - ones) ** 2).sum())
            if (factors >= 0).all() and error < least * (1 - 1e-9):
                least, best = error, factors / scale
    return [float(each) for each in best]


def device(answers: Answers, request: Mapping[str, Any], *, memory_bytes: int) -> Device:
    """The device of a calibration's answers."""
    heads = {name: request[name] for name in ("heads", "kv_heads", "head_dim")}
    first = answers[0]
    kernels: dict[str, Any] = {
        kind: kernel_time(shapes, _of_kernels(answers, kind), **heads)
        for kind, shapes in first["kernels"].items()
    }
    backward = "backward" in kernels
    kernels.setdefault("backward", kernels["whole"])  # of a profile for generation; nobody asks
    elementwise_s, operation_s, call_s = (
        slowest(answer[name] for answer in answers) for name in ("elementwise", "operation", "call")
    )
    products_s = slowest(answer["matmul"][-1] for answer in answers)  # of the widest matrices
    # A call is a forward and a backward; their kernels are counted by themselves.
    kinds = ("whole", "backward") if backward else ()
    own_s = call_s - sum(_of_kernels(answers, kind)[0] for kind in kinds)
    nbytes = first["elementwise"]["numbers"] * first["elementwise"]["bytes_per_number"]
    return Device(
        name=first["device"],
        memory_bytes=memory_bytes,
        **kernels,
        matmul_flops=2 * first["matmul"][-1]["side"] ** 3 / products_s,
        stream_bytes_per_s=nbytes / elementwise_s,
        operation_s=operation_s / first["operation"]["operations"],
        call_s=max(own_s / 2, 0.0),
        element_bytes=_BYTES[request.get("dtype", "bfloat16")],
        alone=_alone(answers),
        **_one_token(answers),
    )


def _one_token(answers: Answers) -> dict[str, Any]:
    """What a step on one token takes, and what comes before the first; nothing where a profile of
    before does not say it."""
    first = answers[0]
    if "steps" not in first:
        return {}
    models = list(zip(*(answer["steps"] for answer in answers), strict=True))
    steps = [slowest(each) for each in models]
    columns = [(1.0, each["text"], each["cross"]) for each in first["steps"]]
    token_s, layer_s, cross_s = not_negative(columns, steps)
    if len(answers) > 1:
        small = (answer["transfers"]["gather"][0] for answer in answers)
        cross_s = max(cross_s - slowest(small, at=0.25), 0.0)
    reading_s = slowest(answer["weights"] for answer in answers)
    new = first["new"]
    new_s, old_s = (slowest(answer[name] for answer in answers) for name in ("new", "elementwise"))
    return {
        "weights_bytes_per_s": first["weights"]["bytes"] / reading_s,
        "token_s": token_s,
        "layer_s": layer_s,
        "cross_layer_s": cross_s,
        # The first forward is no shorter than a later one.
        "begin_s": max(slowest(models[0], "begin_seconds") - steps[0], 0.0),
        # An operation takes longer into new memory than in place.
        "new_byte_s": max(new_s - old_s, 0.0) / (new["numbers"] * new["bytes_written"]),
    }


def link(answers: Answers) -> Link:
    """The links of a calibration's answers: a hop of each kind of transfer."""
    others = len(answers) - 1
    # Bytes that a rank sends; of two shifts at once there are as many pairs as other ranks.
    sent = {"shift": (1, 1), "gather": (others, 1), "exchange": (others, 1), "shifts": (2, others)}
    wires = {}
    for kind, (messages, times) in sent.items():
        records = list(zip(*(answer["transfers"][kind] for answer in answers), strict=True))
        wires[kind] = wire(
            [float(messages * each[0]["bytes"]) for each in records],
            [slowest(each, at=0.25) / times for each in records],
        )
    gather, exchange = wires["gather"], wires["exchange"]
    # Of an all-gather every hop has its latency; of an all-to-all, what the first message's does
    # not explain is for each peer.
    beyond = max(exchange.latency_s - wires["shift"].latency_s, 0.0)
    wires["gather"] = replace(gather, latency_s=gather.latency_s / others)
    wires["exchange"] = replace(exchange, latency_s=beyond / others)
    return Link(**wires, drag_s=_drag(answers), processor_s=_processor(answers))


def _processor(answers: Answers) -> float:
    """Of a rank's time, what a byte takes that it sends: by the largest shift.

    The clock is the processor's, and ranks that share a core wait for each other besides.
    """
    if not answers[0]["device"].startswith("cpu"):
        return 0.0
    largest = [answer["transfers"]["shift"][-1] for answer in answers]
    seconds = np.median(np.mean([each["processor_seconds"] for each in largest], axis=0))
    return float(seconds / largest[0]["bytes"] / _alone(answers))


def _drag(answers: Answers) -> float:
    """What one of two small shifts costs the kernel above it.

    Of large ones nothing can be said: their transfer may itself take longer than the kernel.
    """
    hidden = [answer["hidden"][0] for answer in answers]
    kernel, shifts, both = (slowest(hidden, name) for name in ("kernel", "shifts", "both"))
    return max(both - max(kernel, shifts), 0.0) / 2


def _alone(answers: Answers) -> float:
    """What share of the time a kernel takes on rank 0 while all others wait; 1 where unknown."""
    if "whole_alone" not in answers[0]["kernels"]:
        return 1.0
    alone, together = (_of_kernels(answers, kind) for kind in ("whole_alone", "whole"))
    shares = [one / other for one, other in zip(alone, together, strict=True)]
    return min(statistics.median(shares), 1.0)


def _of_kernels(answers: Answers, kind: str) -> list[float]:
    """Seconds by shape; of one rank alone those of the first."""
    ranks = answers[:1] if kind.endswith("_alone") else answers
    return [slowest(each) for each in zip(*(a["kernels"][kind] for a in ranks), strict=True)]
