"""A comparison of whole steps as a table, and as a plot like the paper's figure 2."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_lvx.compare.document import markdown
from ds_lvx.compare.model.breakdown import PHASES

_BARS: Mapping[str, tuple[Sequence[str], str]] = {
    "vision": (("vision",), "#4c9a6a"),
    "text": (("text",), "#7f8fa6"),
    "cross-attention": (("cross_attention",), "#e1a23b"),
    "waiting in cross-attention": (("exposed_cross_attention",), "#c0392b"),
    "waiting elsewhere": (("exposed_text", "exposed_zero", "exposed_rest"), "#e79a92"),
    "rest": (("rest",), "#d8d8d8"),
}
"""What a bar is made of: columns of a breakdown, and a colour."""
_HATCHES = {"forward": "", "backward": "//", "optimizer": ".."}


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a title, and a line a method; parts are those of the step of median length."""
    rows = [
        (
            "method",
            "step, s",
            "x ring",
            "cross-attention, s",
            "of it waiting",
            "text",
            "vision",
            "waiting elsewhere",
            "rest",
            "hidden",
            "attention sends, MB",
        )
    ]
    ring = next((r for r in results["records"] if r["method"] == "ring"), None)
    for record in results["records"]:
        columns = totals(record["typical"])
        attention = columns["cross-attention"] + columns["waiting in cross-attention"]
        step = record["step_s"]
        faster = "-" if ring is None else _times(ring["step_s"]["median"] / step["median"])
        rows.append(
            (
                record["method"],
                f"{step['median']:.3f} ({step['p10']:.3f} to {step['p90']:.3f})",
                faster,
                f"{attention:.3f}",
                f"{columns['waiting in cross-attention']:.3f}",
                f"{columns['text']:.3f}",
                f"{columns['vision']:.3f}",
                f"{columns['waiting elsewhere']:.3f}",
                f"{columns['rest']:.3f}",
                f"{sum(record['typical']['hidden_s'].values()):.3f}",
                f"{record['attention_bytes'] / 1e6:.2f}",
            )
        )
    left_out = [f"{name} was skipped: {why}." for name, why in results["skipped"].items()]
    return "\n\n".join([title(results), markdown(rows), *left_out])


def _times(ratio: float) -> str:
    return f"{math.floor(ratio * 100) / 100:.2f}"  # never in anybody's favour


def title(results: Mapping[str, Any]) -> str:
    """What was compared, on what."""
    job, plan = results["job"], results["plan"]
    found: Mapping[str, int] = next((record["sizes"] for record in results["records"]), {})
    network = plan["network"]
    where = "" if network is None else f", over an emulated network of {network} a rank"
    name, visual = Path(job["model"]).name, found.get("visual_tokens", 0)
    return (
        f"A training step of {name}: {visual:,} visual tokens, "
        f"{job['text_tokens']:,} text tokens, {job['dtype']}, ZeRO stage {job['zero_stage']}, text "
        f"by {job['text_method']}; {plan['ranks']} ranks (none: 1){where}. Median (10th to 90th "
        f"percentile) of {plan['repeats']}. {results['hardware']['device']}."
    )


def totals(sample: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a broken-down step by kind, all phases together."""
    parts = sample["parts_s"]
    return {
        name: sum(parts[phase][column] for phase in PHASES for column in columns)
        for name, (columns, _) in _BARS.items()
    }


def draw(results: Mapping[str, Any]) -> Any:
    """A figure of matplotlib's: one bar a method, forward below, backward and optimizer above."""
    from matplotlib.figure import Figure  # of the extra "plots"
    from matplotlib.patches import Patch

    records = results["records"]
    figure = Figure(figsize=(2.2 + 1.5 * len(records), 5.2), layout="constrained")
    axes = figure.subplots()
    for place, record in enumerate(records):
        parts, height = record["typical"]["parts_s"], 0.0
        for phase in PHASES:
            for columns, colour in _BARS.values():
                seconds = sum(parts[phase][column] for column in columns)
                axes.bar(
                    place,
                    seconds,
                    bottom=height,
                    width=0.6,
                    color=colour,
                    hatch=_HATCHES[phase],
                    edgecolor="white",
                    linewidth=0.5,
                )
                height += seconds
        axes.text(place, height, f" {height:.3g} s", ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(records)), [record["method"] for record in records])
    axes.set_ylabel("seconds of the slowest rank")
    axes.margins(y=0.08)
    axes.set_title(_wrapped(title(results)), fontsize=8)
    legend = [Patch(facecolor=colour, label=name) for name, (_, colour) in _BARS.items()]
    legend += [
        Patch(facecolor="white", edgecolor="gray", hatch=hatch, label=phase)
        for phase, hatch in _HATCHES.items()
    ]
    axes.legend(handles=legend[::-1], fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _wrapped(text: str) -> str:
    return text.replace("; ", ";\n", 1).replace(". ", ".\n", 1)
