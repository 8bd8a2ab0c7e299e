"""A prediction as text for a terminal and as JSON; of training as the paper's plot (figure 4)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

from ds_lvx.attention.shape import evenly
from ds_lvx.plan.cluster import Cluster, Link
from ds_lvx.plan.cost import cost, obstacle
from ds_lvx.plan.generation import Generation, best
from ds_lvx.plan.memory import elsewhere
from ds_lvx.plan.scenario import Scenario
from ds_lvx.plan.search import CANDIDATES, Plan
from ds_lvx.plan.step import Step
from ds_lvx.plan.units import duration, size

_POINTS = 33  # of a curve

Found: TypeAlias = Plan | Sequence[Generation]


def as_record(scenario: Scenario, cluster: Cluster, found: Found) -> dict[str, Any]:
    """For programs. Seconds and bytes; ``steps`` has every group size and method, ``generations``
    every group size, and ``best`` of these is None where nothing fits."""
    record = {
        "kind": "predicted",
        "job": {**asdict(scenario), "visual_tokens": scenario.visual_tokens},
        "cluster": cluster.record(),
        "memory_limit_bytes": cluster.device.limit_bytes,
    }
    if isinstance(found, Plan):
        return {
            **record,
            "best": _step(found.best),
            "quickest": _step(found.quickest),
            "steps": [_step(each) for each in found.steps],
            "stops": [asdict(each) for each in found.stops],
        }
    taken = best(found)
    return {
        **record,
        "best": None if taken is None else _generation(taken),
        "generations": [_generation(each) for each in found],
    }


def _step(each: Step) -> dict[str, Any]:
    method, _, schedule = each.way.partition(" ")
    names = ("ranks", "text_method", "seconds", "cross_seconds", "parts", "limited_by")
    return {
        **{name: getattr(each, name) for name in (*names, "bytes_sent", "fits")},
        "method": method,
        "schedule": schedule or None,
        "layer": asdict(each.cross),
        "memory": {**asdict(each.footprint), "peak": each.footprint.peak},
    }


def _generation(each: Generation) -> dict[str, Any]:
    names = ("ranks", "token", "prompt", "new_tokens", "bytes_sent", "fits")
    sums = ("token_s", "tokens_per_s", "prompt_s", "seconds")
    memory = {**asdict(each.held), "kept": each.held.kept, "peak": each.held.peak}
    return {**{name: getattr(each, name) for name in (*names, *sums)}, "memory": memory}


# ---- text


def as_text(scenario: Scenario, cluster: Cluster, found: Found) -> str:
    """For people."""
    if isinstance(found, Plan):
        parts = _of_plan(scenario, cluster, found)
    else:
        parts = _of_generations(scenario, cluster, found)
    return "\n\n".join([*parts, f"Predicted, nothing was run. Numbers: {cluster.source}."])


def _of_plan(scenario: Scenario, cluster: Cluster, found: Plan) -> list[str]:
    best = found.best
    parts = [
        _question(scenario, cluster),
        f"{_answer(cluster, found)}\n{_config(scenario, best)}",
    ]
    for ranks in dict.fromkeys((best.ranks, found.quickest.ranks)):
        if ranks > 1:
            parts += [f"Groups of {ranks}, by method of the {scenario.attention}:"]
            parts += [_methods(found, ranks)]
            parts += [_elsewhere(scenario, cluster, ranks)] if scenario.model.among else []
    stops = [
        (each.name, str(each.fits_from or "-"), str(each.fastest_at or "-"), each.reason)
        for each in found.stops
    ]
    return [
        *parts,
        f"The step with {_name(best)}, by part:",
        _durations(best.parts),
        "How far each method goes on these GPUs:",
        _table([("method", "fits from", "fastest at", "why it stops"), *stops]),
    ]


def _of_generations(scenario: Scenario, cluster: Cluster, found: Sequence[Generation]) -> list[str]:
    heads = "ranks, tokens a second, first token, whole answer, sends a token, keys, memory"
    rows = [tuple(heads.split(", "))]
    for each in found:
        bytes_of = (size(each.bytes_sent), size(each.held.keys), _memory(each.held.peak, each.fits))
        times = map(duration, (each.prompt_s, each.seconds))
        rows.append((str(each.ranks), f"{each.tokens_per_s:.3g}", *times, *bytes_of))
    parts = [
        f"{scenario.model.name} generates {found[0].new_tokens:,} tokens after "
        f"{scenario.text_tokens:,} text tokens and {scenario.frames:,} frames = "
        f"{scenario.visual_tokens:,} visual tokens\n{_links(cluster)}",
        _table(rows),
    ]
    taken = best(found)
    if taken is None:
        least = min(found, key=lambda each: each.held.peak)
        return [
            *parts,
            f"Nothing fits: {least.ranks} ranks need {size(least.held.peak)} each, of which "
            f"{size(least.held.weights)} are weights, and {size(cluster.device.limit_bytes)} may "
            "be filled",
        ]
    return [
        *parts,
        f"Most tokens a second: {taken.ranks} ranks. A token, and the first one, by part:",
        _durations(taken.token),
        _durations(taken.prompt),
    ]


def _question(scenario: Scenario, cluster: Cluster) -> str:
    trained = "all weights train" if scenario.vision_trains else "all weights but the tower's train"
    if scenario.lora_r:
        trained = f"LoRA of rank {scenario.lora_r} trains"
    elif not scenario.text_trains:
        trained = "cross-attention trains"
    settings = [
        f"ZeRO {scenario.zero_stage}",
        trained,
        *(["its base in 4 bits"] if scenario.load_in_4bit else []),
        *(["K and V recomputed (lvx)"] if scenario.recomputes("lvx") else []),
        *(["layers checkpointed"] if scenario.checkpointing else []),
    ]
    # Some models' frames take no tokens.
    tokens = f" = {scenario.visual_tokens:,} visual tokens" if scenario.visual_tokens else ""
    return (
        f"{scenario.model.name}: {scenario.text_tokens:,} text tokens, {scenario.frames:,} frames"
        f"{tokens} a sample; {', '.join(settings)}\n"
        f"{_links(cluster)}"
    )


def _links(cluster: Cluster) -> str:
    """The GPUs and what joins them, in words."""

    def rate(link: Link) -> str:
        return f"{link.shift.bytes_per_s / 1e9:.3g} GB/s and {duration(link.shift.latency_s)}"

    joined = f"{rate(cluster.within)} a GPU within a node"
    if cluster.gpus > cluster.gpus_per_node:
        joined += f", {rate(cluster.across)} a node across"
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
    rows = [("method", "step", "cross-attention", "waiting", "sends", "memory", "x ring")]
    for each in steps:
        waiting = each.parts["cross-attention, network"]
        step, cross, waits = map(duration, (each.seconds, each.cross_seconds, waiting))
        faster = "-" if ring is None else f"{ring / each.cross_seconds:.3g}"
        memory = _memory(each.footprint.peak, each.fits)
        rows.append((_name(each), step, cross, waits, size(each.bytes_sent), memory, faster))
    return _table(rows)


def _elsewhere(scenario: Scenario, cluster: Cluster, ranks: int) -> str:
    peak, sent, whole_towers = map(size, elsewhere(scenario, gpus=cluster.gpus, ranks=ranks))
    return (
        f"Elsewhere, with ulysses: {peak} where embeddings are gathered on every rank, which sends "
        f"{sent} more; {whole_towers} where every rank encodes all frames"
    )


def _name(each: Step) -> str:
    return "one rank a sample" if each.ranks == 1 else each.way


def _memory(peak: int, fits: bool) -> str:
    return size(peak) + ("" if fits else ", too much")


def _durations(parts: Mapping[str, float]) -> str:
    return _table([(part, duration(each)) for part, each in parts.items()])


def _table(rows: Sequence[Sequence[str]]) -> str:
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
