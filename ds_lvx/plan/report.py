"""A plan as text for a terminal, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ds_lvx.plan.choose import duration, label
from ds_lvx.plan.cluster import Cluster, Link
from ds_lvx.plan.job import Job
from ds_lvx.plan.search import Plan, Stop
from ds_lvx.plan.step import Step

_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def as_text(job: Job, cluster: Cluster, found: Plan) -> str:
    """For people."""
    best = found.best
    shown = dict.fromkeys((best.ranks, found.quickest.ranks))
    parts = [_question(job, cluster), f"{_answer(cluster, found)}\n{_config(job, best)}"]
    for ranks in (each for each in shown if each > 1):
        parts += [f"Groups of {ranks}, by method of the cross-attention:", _methods(found, ranks)]
    parts += [
        f"The step with {_name(best)}, by part:",
        _table([(part, _time(each)) for part, each in best.parts.items()]),
        "How far each method goes on these GPUs:",
        _table([("method", "fits from", "fastest at", "why it stops"), *map(_stop, found.stops)]),
        f"Predicted, nothing was run. Numbers: {cluster.source}.",
    ]
    return "\n\n".join(parts)


def as_record(job: Job, cluster: Cluster, found: Plan) -> dict[str, Any]:
    """For programs. Seconds and bytes; ``steps`` has every group size and method."""
    return {
        "kind": "predicted",
        "job": {
            **{name: each for name, each in vars(job).items() if name != "model"},
            "model": asdict(job.model),
            "visual_tokens": job.visual_tokens,
        },
        "cluster": cluster.record(),
        "memory_limit_bytes": found.limit_bytes,
        "best": _step_record(found, found.best),
        "quickest": _step_record(found, found.quickest),
        "steps": [_step_record(found, each) for each in found.steps],
        "stops": [asdict(each) for each in found.stops],
    }


def _step_record(found: Plan, each: Step) -> dict[str, Any]:
    return {
        "ranks": each.ranks,
        "method": each.method,
        "schedule": each.schedule if each.method == "lvx" else None,
        "text_method": each.text_method,
        "seconds": each.seconds,
        "cross_seconds": each.cross_seconds,
        "parts": each.parts,
        "limited_by": each.limited_by,
        "bytes_sent": each.bytes_sent,
        "layer": asdict(each.cross),
        "memory": {**asdict(each.footprint), "peak": each.footprint.peak},
        "fits": found.fits(each),
    }


def _question(job: Job, cluster: Cluster) -> str:
    model = job.model
    nodes = -(-cluster.gpus // cluster.gpus_per_node)
    links = f"{_rate(cluster.within)} a GPU within a node"
    if nodes > 1:
        links += f", {_rate(cluster.across)} a node across"
    settings = [f"ZeRO {job.zero_stage}", "all weights train" if job.trains == "all" else ""]
    settings += ["cross-attention trains"] if job.trains == "cross" else []
    settings += ["K and V recomputed (lvx)"] if job.recompute else []
    settings += ["layers checkpointed"] if job.checkpointing else []
    return (
        f"{model.name}: {job.text_tokens:,} text tokens, {job.frames:,} frames = "
        f"{job.visual_tokens:,} visual tokens a sample; {', '.join(filter(None, settings))}\n"
        f"{cluster.gpus:,} x {cluster.device.name}, {cluster.gpus_per_node} a node; {links}"
    )


def _answer(cluster: Cluster, found: Plan) -> str:
    best = found.best
    replicas = cluster.gpus // best.ranks
    text = (
        f"Best: {_name(best)} on groups of {best.ranks}: sequence parallel {best.ranks} x data "
        f"parallel {replicas}, {_time(best.seconds)} a step, {replicas / best.seconds:.3g} samples "
        f"a second; most of it {best.limited_by}"
    )
    quickest = found.quickest
    if quickest.ranks != best.ranks or _name(quickest) != _name(best):
        text += (
            f"\nShortest step: {_name(quickest)} on groups of {quickest.ranks}, "
            f"{_time(quickest.seconds)}"
        )
    return text


def _config(job: Job, best: Step) -> str:
    """What stands in the ds_config for it."""
    rule: dict[str, Any] = {"method": best.method}
    if best.method == "lvx":
        rule |= {"schedule": best.schedule} if best.ranks > 1 else {}
        rule |= {"recompute_kv": True} if job.recompute else {}
    return (
        f'In the ds_config: "sequence_parallel_size": {best.ranks}; cross-attention '
        f"{json.dumps(rule)}; text {json.dumps({'method': best.text_method})}"
    )


def _methods(found: Plan, ranks: int) -> str:
    steps = found.at(ranks)
    ring = next((each for each in steps if each.method == "ring"), None)
    rows: list[Sequence[str]] = [
        ("method", "step", "cross-attention", "waiting", "sends", "memory", "x ring")
    ]
    for each in steps:
        memory = _size(each.footprint.peak) + ("" if found.fits(each) else ", too much")
        speed = "-" if ring is None else f"{ring.cross_seconds / each.cross_seconds:.3g}"
        waiting = each.parts["cross-attention, network"]
        rows.append(
            (
                _name(each),
                _time(each.seconds),
                _time(each.cross_seconds),
                _time(waiting),
                _size(each.bytes_sent),
                memory,
                speed,
            )
        )
    return _table(rows)


def _stop(stop: Stop) -> tuple[str, ...]:
    sizes = ("-" if size is None else str(size) for size in (stop.fits_from, stop.fastest_at))
    return (stop.name, *sizes, stop.reason)


def _name(each: Step) -> str:
    return "one rank a sample" if each.ranks == 1 else label(each.method, each.schedule)


def _time(seconds: float) -> str:
    return duration(seconds)


def _size(nbytes: float) -> str:
    for factor, unit in _UNITS:
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.0f} B"


def _rate(link: Link) -> str:
    wire = link.shift
    return f"{wire.bytes_per_s / 1e9:.3g} GB/s and {duration(wire.latency_s)}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(f"  {line}" for line in lines)
