"""A comparison as a plot: seconds of a step by method, and how much faster than ring it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_lvx.compare.operators.report import times, title

COLOURS = {"lvx": "C2", "ring": "C3", "ulysses": "C0", "none": "C7"}


def save(results: Mapping[str, Any], path: Path) -> None:
    """Draw into a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    found = list(results["records"])[::-1]
    figure = Figure(figsize=(10, 1.6 + 0.45 * len(found)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    figure.suptitle(f"{title(results)} ({results['kind']})", fontsize=9)
    _draw_seconds(left, found)
    _draw_speedups(right, found)
    figure.savefig(path, dpi=110)


def _draw_seconds(axes: Any, found: list[Any]) -> None:
    places = range(len(found))
    for place, record in enumerate(found):
        step = record["step_s"]
        spread = [[step["median"] - step["p10"]], [step["p90"] - step["median"]]]
        axes.errorbar(step["median"], place, xerr=spread, fmt="o", capsize=3, color=_colour(record))
    kernels = [record["kernels_s"]["median"] for record in found]
    axes.plot(kernels, places, "k|", markersize=14, label="its kernels alone")
    axes.set_yticks(places, [record["method"] for record in found])
    axes.set_xscale("log")
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.set_xlabel("seconds, forward + backward; median, p10 to p90")
    axes.legend(fontsize=8)


def _draw_speedups(axes: Any, found: list[Any]) -> None:
    peers = {record["method"] for record in found}
    # Without ring the slowest method is the measure.
    slowest = max(found, key=lambda record: record["step_s"]["median"])["method"]
    peer = "ring" if "ring" in peers else slowest
    ratios = [record["times_faster_than"].get(peer, 1.0) for record in found]
    bars = axes.barh(range(len(found)), ratios, color=[_colour(record) for record in found])
    axes.bar_label(bars, [f"{times(ratio)} x" for ratio in ratios], padding=3, fontsize=8)
    axes.set_xlim(0, 1.2 * max(ratios))
    axes.set_xlabel(f"times faster than {peer}")


def _colour(record: Mapping[str, Any]) -> str:
    return COLOURS[record["method"].partition("-")[0]]
