"""The memory benchmark's results as tables in Markdown and as a plot.

A table stands in a document between two comment lines, and is written there again by every run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ds_lvx.compare.document import markdown, write_between

NAMES = ("memory", "step_time")
PLAIN = "lvx"
_COLOURS = {"trained": "C0", "frozen": "C1"}


def table(name: str, results: Mapping[str, Any]) -> str:
    """``memory.json`` or ``step_time.json`` as a table in Markdown."""
    return _memory_table(results) if name == "memory" else _time_table(results)


def write_into(document: Path, name: str, results: Mapping[str, Any]) -> None:
    """Replace the table in a document; see `ds_lvx.compare.document.write_between`."""
    write_between(document, f"bench_memory.py, {name}", table(name, results))


def _memory_table(results: Mapping[str, Any]) -> str:
    records = results["records"]
    plain = {r["features"]: r["tokens_per_gib"] for r in records if r["name"] == PLAIN}
    rows = [
        (
            "features",
            "setting",
            "kept, bytes a token",
            "peak, bytes a token",
            "formula",
            "measured / formula",
            "tokens per GiB",
            "x plain",
            "step, s",
            "processor, s",
            "largest run: tokens, GiB",
        )
    ]
    for record in records:
        gain = record["tokens_per_gib"] / plain.get(record["features"], float("nan"))
        rows.append(
            (
                record["features"],
                record["name"],
                f"{record['kept_bytes_per_token']:,.0f}",
                f"{record['peak_bytes_per_token']:,.0f}",
                f"{record['predicted']['peak_bytes_per_token']:,.0f}",
                f"{record['measured_over_predicted']:.3f}",
                f"{record['tokens_per_gib']:,.0f}",
                f"{gain:.1f}",
                f"{record['step_s']['median']:.1f}",
                f"{record['processor_s']['median']:.1f}",
                _largest(record),
            )
        )
    case, ranks = results["case"], results["ranks"]
    title = (
        f"{case['cross_layers']} cross-attention layers of {case['hidden']}, {case['heads']} heads "
        f"and {case['kv_heads']} of K and V, bf16; {ranks} ranks, tokens and bytes of one; "
        f"{case['text_tokens']} text tokens. Step times at {records[0]['timed']['tokens']:,} "
        f"tokens. {results['hardware']['device']}."
    )
    return f"{title}\n\n{markdown(rows)}"


def _largest(record: Mapping[str, Any]) -> str:
    if not record["budget_bytes"]:
        return "-"
    run = record["runs"][-1]
    return f"{run['tokens']:,}, {run['peak_bytes'] / 2**30:.2f}"


def _time_table(results: Mapping[str, Any]) -> str:
    records = results["records"]
    rows = [
        (
            "vision tower",
            "checkpointing",
            "K, V kept: step, s",
            "recomputed: step, s",
            "costs",
            "costs in processor time",
        ),
    ]
    for record in records:
        kept, again = (_seconds(record["step_s"][name]) for name in ("kept", "recomputed"))
        rows.append(
            (
                record["vision_tower"],
                "yes" if record["checkpointing"] else "no",
                kept,
                again,
                f"{record['recomputation_costs']['step_s']:+.1%}",
                f"{record['recomputation_costs']['processor_s']:+.1%}",
            )
        )
    tokens = records[0]["visual_tokens"]
    title = (
        "A whole step of one eighth of the model at its real dimensions, "
        f"{tokens:,} visual tokens, {results['case']['text_tokens']} text tokens, one process; "
        f"median (10th to 90th percentile). {results['hardware']['device']}."
    )
    return f"{title}\n\n{markdown(rows)}"


def _seconds(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['p10']:.2f} to {spread['p90']:.2f})"


def draw(results: Mapping[str, Any]) -> Figure:
    """Visual tokens per GiB by setting, with what the formula says as a mark."""
    records = list(results["records"])[::-1]
    figure = Figure(figsize=(9, 1.2 + 0.34 * len(records)), layout="constrained")
    axes = figure.subplots()
    places = range(len(records))
    values = [record["tokens_per_gib"] for record in records]
    bars = axes.barh(places, values, color=[_COLOURS[record["features"]] for record in records])
    axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=8, fontsize=8)
    predicted = [2**30 / record["predicted"]["peak_bytes_per_token"] for record in records]
    axes.plot(predicted, places, "k|", markersize=12, label="formula")
    axes.set_yticks(places, [f"{r['name']} ({r['features']})" for r in records], fontsize=8)
    axes.set_xlim(0, 1.15 * max(values))
    axes.set_xlabel("visual tokens per GiB of a rank, at the peak of a training step")
    axes.set_title("Room for visual tokens; in brackets, whether their features want a gradient")
    axes.legend(loc="center right")
    return figure
