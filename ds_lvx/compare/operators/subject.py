"""The subject of ``ds-lvx compare``: one attention by every method, and what its ranks found."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ds_lvx.compare.document import Cells, Results, columns, percentiles, times
from ds_lvx.compare.harness import GATHERED, Ranks, slowest, spread
from ds_lvx.compare.machine import header
from ds_lvx.compare.operators.exactness import Difference
from ds_lvx.compare.operators.rank import Contest
from ds_lvx.compare.operators.tensors import ORDERS

PEERS = ("ring", "ulysses", GATHERED)
_SHOWN = 10  # disagreements of one message


class DisagreementError(RuntimeError):
    """Methods do not compute the same; the message says where."""


def assemble(
    contest: Contest,
    answers: Sequence[Mapping[str, Any]],
    ranks: Ranks,
    *,
    skipped: Mapping[str, str],
    ranks_of_a_node: int = 1,
) -> dict[str, Any]:
    """Everything for the JSON; ``ranks`` is where the answers come from.

    Raises:
        DisagreementError: methods do not compute the same.
    """
    largest, network = _check(answers), ranks.network
    return {
        **header(emulated=network is not None, device=ranks.device),
        "network": None if network is None else network.record(ranks_of_a_node),
        "ranks": ranks.count,
        "threads_per_rank": ranks.threads,
        "units": "seconds of the slowest rank in each step, begun together; bytes of the rank that "
        "sends most, forward and backward of one step; `ranks` has every sample of every rank",
        **asdict(contest),
        "skipped": dict(skipped),
        "largest_differences": largest,
        "records": _records(answers),
    }


def _check(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The largest difference of each pair and tensor over all ranks, as records for the JSON."""
    found = [Difference(**record) for answer in answers for record in answer["differences"]]
    found.sort(key=lambda difference: -difference.error)
    bad = [difference for difference in found if difference.is_too_large]
    if bad:
        lines = "\n".join(f"  {difference}" for difference in bad[:_SHOWN])
        more = f"\n  and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise DisagreementError(
            f"the methods disagree; nothing was timed. The largest first:\n{lines}{more}"
        )
    about = ("shape", "one", "other", "tensor", "error", "tolerance")
    largest: dict[tuple[str, ...], dict[str, Any]] = {}
    for own in found:
        record = {name: getattr(own, name) for name in about}
        largest.setdefault((own.shape, own.one, own.other, own.tensor), record)
    return list(largest.values())


def _records(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record a method: seconds of the slowest rank, bytes of the rank that sends most."""
    found = []
    for method in answers[0]["methods"]:
        ranks = [answer["methods"][method] for answer in answers if method in answer["methods"]]
        step = _slowest(ranks, "step", "forward_s", "backward_s")
        kernels = _slowest(ranks, "kernels", "forward_s", "backward_s")
        record = {
            "method": method,
            "step_s": step,
            "forward_s": _slowest(ranks, "step", "forward_s"),
            "backward_s": _slowest(ranks, "step", "backward_s"),
            "kernels_s": kernels,
            "kernels_processor_s": [
                statistics.median(own) for r in ranks if (own := r["kernels"]["processor_s"])
            ],
            "exposed_s": step["median"] - kernels["median"],
            "step_over_kernels": step["median"] / kernels["median"],
            "bytes_sent": max(rank["traffic"]["bytes_sent"] for rank in ranks),
            "messages": max(rank["traffic"]["calls"] for rank in ranks),
            "interface_over_traffic": _interface_over_traffic(ranks),
            "ranks": ranks,
        }
        found.append(record)
    for record in found:
        record["times_faster_than"] = {
            other["method"]: other["step_s"]["median"] / record["step_s"]["median"]
            for other in found
            if other is not record
        }
    return found


def _slowest(ranks: Sequence[Mapping[str, Any]], part: str, *names: str) -> dict[str, Any]:
    """Seconds of a part of each step on the rank that took longest."""
    steps = (zip(*(rank[part][name] for name in names), strict=True) for rank in ranks)
    return spread(slowest(*(map(sum, each) for each in steps)))


def _interface_over_traffic(ranks: Sequence[Mapping[str, Any]]) -> float | None:
    """What left the interface without packet headers, over what `ds_lvx.traffic` counted; of the
    rank that is furthest from 1."""
    ratios = [
        rank["interface"]["sent_payload_bytes"]
        / (rank["traffic"]["bytes_sent"] + rank["traffic"]["control_bytes"])
        for rank in ranks
        if rank["interface"] is not None and rank["traffic"]["bytes_sent"]
    ]
    return max(ratios, key=lambda ratio: abs(ratio - 1.0)) if ratios else None


# ---- the report


def count(number: int) -> str:
    """``65536`` as ``64K``."""
    return f"{number // 1024}K" if number >= 1024 and number % 1024 == 0 else f"{number:,}"


def name(results: Results) -> str:
    """A name for the files of a comparison, from what was compared."""
    shape, network = results["shape"], results["network"]
    words = [
        f"compare-q{count(shape['seqlen_q'])}-kv{count(shape['seqlen_kv'])}",
        f"ranks{results['ranks']}",
        "" if shape["visibility"] == "all" else shape["visibility"],
        "" if shape["features_dim"] is None else ("features", "recompute")[results["recompute"]],
        "" if results["overlap"] else "no-overlap",
        "-".join(order for order in _orders(results) if order != ORDERS[0]),
    ]
    where = "" if network is None else "-" + network["name"].replace(",", "-")
    return "-".join(filter(None, words)).replace(",", "") + where


def text(results: Results) -> str:
    """What was compared on what, and a line a method. Ratios are rounded to our disadvantage."""

    def faster(peer: str) -> Callable[[Any], str]:
        return lambda r: _ratio(r["times_faster_than"].get(peer))

    def processors(r: Mapping[str, Any]) -> str:
        return ", ".join(map(_seconds, r["kernels_processor_s"]))

    measured = {record["method"] for record in results["records"]}
    cells: Cells = {
        "method": lambda r: (
            r["method"] + f" ({r['ranks'][0]['schedule']})" * (r["method"] == "lvx-auto")
        ),
        "forward, s": lambda r: _seconds(r["forward_s"]["median"]),
        "backward, s": lambda r: _seconds(r["backward_s"]["median"]),
        "step, s (p10 to p90)": lambda r: percentiles(r["step_s"], _seconds),
        "kernels alone, s": lambda r: _seconds(r["kernels_s"]["median"]),
        "step / kernels": lambda r: f"{math.ceil(r['step_over_kernels'] * 100) / 100:.2f}",
        "sent a rank, MB": lambda r: f"{r['bytes_sent'] / 1e6:.3f}",
        **({"kernels a rank, processor s": processors} if len(_orders(results)) > 1 else {}),
        **{f"x {peer}": faster(peer) for peer in PEERS if peer != GATHERED or peer in measured},
    }
    caption = [
        f"{results['kind']} on {results['hardware']['device']}, {results['threads_per_rank']} "
        f"threads a rank; medians of {results['repeats']} steps of the slowest rank",
        *(f"{method}: skipped, {reason}" for method, reason in results["skipped"].items()),
    ]
    return f"{title(results)}; {'; '.join(caption)}.\n\n{columns(results['records'], cells)}"


def title(results: Results) -> str:
    """One line about what was compared, on what."""
    shape, network = results["shape"], results["network"]
    how = "projected again by lvx" if results["recompute"] else "kept"
    features = f"K and V from features of {shape['features_dim']}, {how}"
    words = {
        f"batch {shape['batch']}": shape["batch"] > 1,
        f"S_q = {count(shape['seqlen_q'])}": True,
        f"S_kv = {count(shape['seqlen_kv'])}": True,
        f"{shape['heads']} heads ({shape['kv_heads']} of K and V) of {shape['head_dim']}": True,
        shape["dtype"]: True,
        f"{results['ranks']} ranks": True,
        f"visibility {shape['visibility']}": shape["visibility"] != "all",
        features: shape["features_dim"] is not None,
        "no overlap": not results["overlap"],
        f"emulated network of {network and network['name']}": network is not None,
    }
    return ", ".join(word for word, is_said in words.items() if is_said)


def _orders(results: Results) -> Sequence[str]:
    return results.get("orders", ORDERS[:1])  # older files have none


def _ratio(ratio: float | None) -> str:
    return times(ratio, 2 if ratio is None or ratio < 10 else 1)


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 else f"{value:.4f}"


def draw(results: Results) -> Any:
    """Seconds of a step by method, and how much faster than ring it is."""
    from matplotlib.figure import Figure  # of the extra "plots"

    found = list(results["records"])[::-1]
    names, places = [record["method"] for record in found], range(len(found))
    colours = {"lvx": "C2", "ring": "C3", "ulysses": "C0", GATHERED: "C1", "none": "C7"}
    own = [colours[method.partition(" ")[0].partition("-")[0]] for method in names]
    figure = Figure(figsize=(10, 1.6 + 0.45 * len(found)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    figure.suptitle(f"{title(results)} ({results['kind']})", fontsize=9)
    for place, record, colour in zip(places, found, own, strict=True):
        step = record["step_s"]
        around = [[step["median"] - step["p10"]], [step["p90"] - step["median"]]]
        left.errorbar(step["median"], place, xerr=around, fmt="o", capsize=3, color=colour)
    kernels = [record["kernels_s"]["median"] for record in found]
    left.plot(kernels, places, "k|", markersize=14, label="its kernels alone")
    left.set_yticks(places, names)
    left.grid(axis="x", which="both", alpha=0.3)
    left.set(xscale="log", xlabel="seconds, forward + backward; median, p10 to p90")
    left.legend(fontsize=8)
    # Without ring the slowest method is the measure.
    slow = max(found, key=lambda record: record["step_s"]["median"])["method"]
    peer = "ring" if "ring" in names else slow
    ratios = [record["times_faster_than"].get(peer, 1.0) for record in found]
    bars = right.barh(places, ratios, color=own)
    right.bar_label(bars, [f"{_ratio(ratio)} x" for ratio in ratios], padding=3, fontsize=8)
    right.set(xlim=(0, 1.2 * max(ratios)), xlabel=f"times faster than {peer}")
    return figure
