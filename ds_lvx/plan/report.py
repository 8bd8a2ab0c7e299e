"""A plan as text for a terminal, as JSON, and as the paper's plot (figure 4)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ds_lvx.attention.shape import evenly
from ds_lvx.plan.cluster import Cluster, Link
from ds_lvx.plan.cost import cost, obstacle
from ds_lvx.plan.peers import peers
from ds_lvx.plan.scenario import Scenario
from ds_lvx.plan.search import CANDIDATES, Plan
from ds_lvx.plan.step import Step
from ds_lvx.plan.units import duration, size

_POINTS = 33  # of a curve


def as_record(scenario: Scenario, cluster: Cluster, found: Plan) -> dict[str, Any]:
    """For programs. Seconds and bytes; ``steps`` has every group size and method."""

    def record(each: Step) -> dict[str, Any]:
        method, _, schedule = each.way.partition(" ")
        names = ("ranks", "text_method", "seconds", "cross_seconds", "parts", "limited_by")
        return {
            **{name: getattr(each, name) for name in (*names, "bytes_sent", "fits")},
            "method": method,
            "schedule": schedule or None,
            "layer": asdict(each.cross),
            "memory": {**asdict(each.footprint), "peak": each.footprint.peak},
        }

    return {
        **asked(scenario, cluster),
        "best": record(found.best),
        "quickest": record(found.quickest),
        "steps": [record(each) for each in found.steps],
        "stops": [asdict(each) for each in found.stops],
    }


def asked(scenario: Scenario, cluster: Cluster) -> dict[str, Any]:
    """What the record of a prediction begins with."""
    return {
        "kind": "predicted",
        "job": {**asdict(scenario), "visual_tokens": scenario.visual_tokens},
        "cluster": cluster.record(),
        "memory_limit_bytes": cluster.device.limit_bytes,
    }


# ---- text


def as_text(scenario: Scenario, cluster: Cluster, found: Plan) -> str:
    """For people."""
    best = found.best
    parts = [
        _question(scenario, cluster),
        f"{_answer(cluster, found)}\n{_config(scenario, best)}",
    ]
    for ranks in dict.fromkeys((best.ranks, found.quickest.ranks)):
        if ranks > 1:
            parts += [f"Groups of {ranks}, by method of the {scenario.attention}:"]
            parts += [_methods(found, ranks)]
            parts += [_peers(scenario, cluster, ranks)] if scenario.model.among else []
    stops = [
        (each.name, str(each.fits_from or "-"), str(each.fastest_at or "-"), each.reason)
        for each in found.stops
    ]
    parts += [
        f"The step with {_name(best)}, by part:",
        table([(part, duration(each)) for part, each in best.parts.items()]),
        "How far each method goes on these GPUs:",
        table([("method", "fits from", "fastest at", "why it stops"), *stops]),
        f"Predicted, nothing was run. Numbers: {cluster.source}.",
    ]
    return "\n\n".join(parts)


def _question(scenario: Scenario, cluster: Cluster) -> str:
    settings = [
        f"ZeRO {scenario.zero_stage}",
        "all weights train" if scenario.trains_all else "cross-attention trains",
        *(["K and V recomputed (lvx)"] if scenario.recomputes("lvx") else []),
        *(["layers checkpointed"] if scenario.checkpointing else []),
    ]
    # Some models' frames take no tokens.
    tokens = f" = {scenario.visual_tokens:,} visual tokens" if scenario.visual_tokens else ""
    return (
        f"{scenario.model.name}: {scenario.text_tokens:,} text tokens, {scenario.frames:,} frames"
        f"{tokens} a sample; {', '.join(settings)}\n"
        f"{links(cluster)}"
    )


def links(cluster: Cluster) -> str:
    """The GPUs and what joins them, in words."""
    joined = f"{_rate(cluster.within)} a GPU within a node"
    if cluster.gpus > cluster.gpus_per_node:
        joined += f", {_rate(cluster.across)} a node across"
    return f"{cluster.gpus:,} x {cluster.device.name}, {cluster.gpus_per_node} a node; {joined}"


def _answer(cluster: Cluster, found: Plan) -> str:
    best, quickest = found.best, found.quickest
    replicas = cluster.gpus // best.ranks
    text = (
        f"Best: {_name(best)} on groups of {best.ranks}: sequence parallel {best.ranks} x data "
        f"parallel {replicas}, {duration(best.seconds)} a step, {replicas / best.seconds:.3g} "
        f"samples a second; most of it {best.limited_by}"
    )
    if quickest == best:
        return text
    shortest = f"{_name(quickest)} on groups of {quickest.ranks}, {duration(quickest.seconds)}"
    return f"{text}\nShortest step: {shortest}"


def _config(scenario: Scenario, best: Step) -> str:
    """What stands in the ds_config for it."""
    method, _, schedule = best.way.partition(" ")
    rule: dict[str, Any] = {"method": method}
    if schedule and best.ranks > 1:
        rule["schedule"] = schedule
    if scenario.recomputes(best.way):
        rule["recompute_kv"] = True
    tiles = f'"loss_tiles": {scenario.loss_tiles}; ' if scenario.loss_tiles > 1 else ""
    text = "" if scenario.model.among else f"; text {json.dumps({'method': best.text_method})}"
    return (
        f'In the ds_config: "sequence_parallel_size": {best.ranks}; {tiles}{scenario.attention} '
        f"{json.dumps(rule)}{text}"
    )


def _methods(found: Plan, ranks: int) -> str:
    steps = found.at(ranks)
    ring = next((each.cross_seconds for each in steps if each.way == "ring"), None)
    rows: list[tuple[str, ...]] = [
        ("method", "step", "cross-attention", "waiting", "sends", "memory", "x ring")
    ]
    for each in steps:
        waiting = each.parts["cross-attention, network"]
        times = map(duration, (each.seconds, each.cross_seconds, waiting))
        memory = size(each.footprint.peak) + ("" if each.fits else ", too much")
        faster = "-" if ring is None else f"{ring / each.cross_seconds:.3g}"
        rows.append((_name(each), *times, size(each.bytes_sent), memory, faster))
    return table(rows)


def _peers(scenario: Scenario, cluster: Cluster, ranks: int) -> str:
    other = peers(scenario, gpus=cluster.gpus, ranks=ranks)
    return (
        f"Elsewhere, with ulysses: {size(other.gathered)} where embeddings are gathered on every "
        f"rank, which sends {size(other.sent)} more; {size(other.whole_towers)} where every rank "
        "encodes all frames"
    )


def _name(each: Step) -> str:
    return "one rank a sample" if each.ranks == 1 else each.way


def _rate(link: Link) -> str:
    return f"{link.shift.bytes_per_s / 1e9:.3g} GB/s and {duration(link.shift.latency_s)}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(f"  {line}" for line in lines)


# ---- plot


def save_plot(scenario: Scenario, cluster: Cluster, ranks: int, path: Path) -> None:
    """Write the plot: speed-up over ring attention against S_q / S_kv; a line for the scenario.

    Of the attention alone, forward and backward, without the projection of K and V, which is the
    same for all. Groups of one rank have none, and are drawn with all GPUs.
    """
    from matplotlib.figure import Figure

    if cluster.gpus == 1:
        raise ValueError("--plot: got one GPU; expected at least 2, to have something to compare")
    ranks, keys = ranks if ranks > 1 else cluster.gpus, scenario.visual_tokens
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in _curves(scenario, cluster, ranks).items():
        axes.plot(*zip(*points, strict=True), label=name)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.axvline(scenario.text_tokens / keys, color="black", linewidth=0.8, linestyle=":")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=f"S_q / S_kv, S_kv = {keys:,}; dotted: {scenario.text_tokens:,} text tokens",
        ylabel="predicted speed-up over ring attention",
        title=f"Cross-attention of {scenario.model.name.rpartition('/')[2]}, forward and "
        f"backward,\n{ranks} x {cluster.device.name}, {cluster.gpus_per_node} a node",
    )
    axes.legend()
    figure.savefig(path, dpi=110)


def _curves(
    scenario: Scenario, cluster: Cluster, ranks: int
) -> dict[str, list[tuple[float, float]]]:
    """``(S_q / S_kv, speed-up)`` by method."""
    found: dict[str, list[tuple[float, float]]] = {}
    keys = scenario.visual_tokens
    for point in range(_POINTS):
        queries = max(round(keys ** (point / (_POINTS - 1))), 1)
        q_lengths = tuple(evenly(queries, ranks))
        shape = replace(scenario.cross_shape(ranks, "ring"), q_lengths=q_lengths, features_dim=0)
        ring = cost(shape, cluster, "ring").seconds
        for way in CANDIDATES:
            if way != "ring" and obstacle(shape, way) is None:
                speedup = ring / cost(shape, cluster, way).seconds
                found.setdefault(way, []).append((queries / keys, speedup))
    return found
