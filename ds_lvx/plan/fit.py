"""From the samples of a calibration to the numbers of a `Cluster`.

A sample is the time of the slowest rank; of each list of samples the median counts. The terms of a
kernel's time and of a link's are fitted by least squares of the relative error, none below zero.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from ds_lvx.plan.cluster import Device, KernelTime, Link, Wire

KINDS = ("whole", "partial", "backward")


def slowest(answers: Sequence[Any]) -> float:
    """The median over repeats of the slowest rank's seconds."""
    return statistics.median(max(each) for each in zip(*answers, strict=True))


def kernel_time(
    shapes: Sequence[Mapping[str, int]],
    seconds: Sequence[float],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> KernelTime:
    """A kernel's cost a call, a pair, a number of K, and a number of q."""
    columns = [
        (
            1.0,
            float(shape["seqlen_q"] * shape["seqlen_kv"] * heads * head_dim),
            float(shape["seqlen_kv"] * kv_heads * head_dim),
            float(shape["seqlen_q"] * heads * head_dim),
        )
        for shape in shapes
    ]
    call_s, pair_s, key_s, row_s = not_negative(columns, seconds)
    return KernelTime(call_s, pair_s, key_s, row_s)


def wire(nbytes: Sequence[float], seconds: Sequence[float]) -> Wire:
    """Latency and bytes a second."""
    latency_s, byte_s = not_negative([(1.0, each) for each in nbytes], seconds)
    return Wire(bytes_per_s=1 / max(byte_s, 1e-15), latency_s=latency_s)


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
    elementwise, matmul, operation = (
        answers[0][name] for name in ("elementwise", "matmul", "operation")
    )
    seconds = {
        name: slowest([answer[name]["seconds"] for answer in answers])
        for name in ("elementwise", "matmul", "operation", "call")
    }
    # A call is a forward and a backward; their kernels are counted by themselves.
    own = seconds["call"] - kernels["whole"].call_s - kernels["backward"].call_s
    numbers = elementwise["numbers"] * elementwise["bytes_per_number"]
    return Device(
        name=answers[0]["device"],
        memory_bytes=memory_bytes,
        **kernels,
        matmul_flops=2 * matmul["side"] ** 3 / seconds["matmul"],
        stream_bytes_per_s=numbers / seconds["elementwise"],
        operation_s=seconds["operation"] / operation["operations"],
        call_s=max(own / 2, 0.0),
        alone=_alone(answers),
    )


def link(answers: Sequence[Mapping[str, Any]]) -> Link:
    """The links of a calibration's answers: a hop of each kind of transfer."""
    others = len(answers) - 1
    wires = {
        kind: wire(*_of_transfers(answers, kind, others if kind != "shift" else 1))
        for kind in ("shift", "gather", "exchange")
    }
    gather, exchange = wires["gather"], wires["exchange"]
    # Of an all-gather every hop has its latency; of an all-to-all, what the first message's does
    # not explain is for each peer.
    beyond = max(exchange.latency_s - wires["shift"].latency_s, 0.0)
    return Link(
        shift=wires["shift"],
        gather=Wire(gather.bytes_per_s, gather.latency_s / others),
        exchange=Wire(exchange.bytes_per_s, beyond / others),
    )


def errors(answers: Sequence[Mapping[str, Any]], of: Device, request: Mapping[str, Any]) -> Any:
    """What the fit leaves: predicted over measured of every kernel's shape."""
    width = {kind: request[kind] * request["head_dim"] for kind in ("heads", "kv_heads")}
    found: dict[str, list[dict[str, float]]] = {}
    for kind in KINDS:
        shapes, seconds = _of_kernels(answers, kind)
        time: KernelTime = getattr(of, kind)
        for shape, measured in zip(shapes, seconds, strict=True):
            rows, keys = shape["seqlen_q"], shape["seqlen_kv"]
            predicted = time.seconds(
                pairs=rows * keys * width["heads"],
                keys=keys * width["kv_heads"],
                rows=rows * width["heads"],
            )
            found.setdefault(kind, []).append({**shape, "ratio": predicted / measured})
    return found


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
    return nbytes, [slowest([r["seconds"] for r in each]) for each in zip(*records, strict=True)]


def _alone(answers: Sequence[Mapping[str, Any]]) -> float:
    """What share of the time a kernel takes on rank 0 while all others wait."""
    shares = []
    for record in answers[0]["kernels"]["alone"]:
        same = [
            next(
                each["seconds"]
                for each in answer["kernels"]["partial"]
                if (each["seqlen_q"], each["seqlen_kv"])
                == (record["seqlen_q"], record["seqlen_kv"])
            )
            for answer in answers
        ]
        shares.append(statistics.median(record["seconds"]) / slowest(same))
    return min(statistics.median(shares), 1.0)
