"""A prediction of generation as text for a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ds_lvx.plan.cluster import Cluster
from ds_lvx.plan.generation import Generation, best
from ds_lvx.plan.report import asked, links, table
from ds_lvx.plan.scenario import Scenario
from ds_lvx.plan.units import duration, size


def as_record(scenario: Scenario, cluster: Cluster, found: Sequence[Generation]) -> dict[str, Any]:
    """For programs. Seconds and bytes; ``best`` is None where nothing fits."""

    def record(each: Generation) -> dict[str, Any]:
        names = ("ranks", "token", "prompt", "new_tokens", "bytes_sent", "fits")
        sums = ("token_s", "tokens_per_s", "prompt_s", "seconds")
        memory = {**asdict(each.held), "kept": each.held.kept, "peak": each.held.peak}
        return {**{name: getattr(each, name) for name in (*names, *sums)}, "memory": memory}

    taken = best(found)
    return {
        **asked(scenario, cluster),
        "best": None if taken is None else record(taken),
        "generations": [record(each) for each in found],
    }


def as_text(scenario: Scenario, cluster: Cluster, found: Sequence[Generation]) -> str:
    """For people."""
    heads = "ranks, tokens a second, first token, whole answer, sends a token, keys, memory"
    rows = [tuple(heads.split(", "))]
    for each in found:
        memory = size(each.held.peak) + ("" if each.fits else ", too much")
        times = map(duration, (each.prompt_s, each.seconds))
        bytes_of = (size(each.bytes_sent), size(each.held.keys), memory)
        rows.append((str(each.ranks), f"{each.tokens_per_s:.3g}", *times, *bytes_of))
    parts = [
        f"{scenario.model.name} generates {found[0].new_tokens:,} tokens after "
        f"{scenario.text_tokens:,} text tokens and {scenario.frames:,} frames = "
        f"{scenario.visual_tokens:,} visual tokens\n{links(cluster)}",
        table(rows),
    ]
    taken = best(found)
    if taken is None:
        least = min(found, key=lambda each: each.held.peak)
        parts.append(
            f"Nothing fits: {least.ranks} ranks need {size(least.held.peak)} each, of which "
            f"{size(least.held.weights)} are weights, and {size(cluster.device.limit_bytes)} may "
            "be filled"
        )
    else:
        parts += [
            f"Most tokens a second: {taken.ranks} ranks. A token, and the first one, by part:",
            table([(name, duration(each)) for name, each in taken.token.items()]),
            table([(name, duration(each)) for name, each in taken.prompt.items()]),
        ]
    return "\n\n".join([*parts, f"Predicted, nothing was run. Numbers: {cluster.source}."])
