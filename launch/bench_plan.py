"""Show how right the planner is: against measured runs, and against the paper's table.

    python launch/bench_plan.py --parts published                   no measurement, a second
    python launch/bench_plan.py --parts network                     as root; twenty minutes
    python launch/bench_plan.py --parts network --rates 200mbit --ranks 2      one piece of it
    python launch/bench_plan.py --render --document docs/planning.md           tables from the JSON

``network`` measures every method over an emulated network (`ds-lvx compare`), at several rates,
shapes and numbers of ranks, and beside it, by itself, a profile of this machine on that network
(`ds-lvx plan --calibrate`). The prediction sees the profile and nothing of the runs. Writes
plan_network.json and plan_published.json, with plots, into --output_dir.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import published
from bench.pooled import pooled, short
from bench.script import usual_parser
from ds_lvx.attention.shape import AttentionShape
from ds_lvx.compare.document import columns, markdown, save, write_between
from ds_lvx.compare.harness import Ranks
from ds_lvx.compare.machine import header
from ds_lvx.compare.network import Network
from ds_lvx.models.cuts import split
from ds_lvx.plan import calibrate
from ds_lvx.plan.choose import cheapest
from ds_lvx.plan.cluster import Cluster
from ds_lvx.plan.cost import cost

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("published", "network")
RATES = ("200mbit", "500mbit", "2gbit")
SHAPES = ("64x16384", "256x16384", "1024x4096")
READINGS = ("both ways", "one way")
CASE = ("network", "ranks", "seqlen_q", "seqlen_kv")
"""What the results call a run."""


def main() -> None:
    """Measure or predict, then write JSON, tables and plots."""
    options = parse_options()
    for part in options.parts:
        path = options.output_dir / f"plan_{part}.json"
        if part == "published":
            results = published_results()
        elif options.render:
            results = json.loads(path.read_text())
            for piece in results["pieces"]:  # by the formulas as they are now
                piece["profile"] = calibrate.refit(piece["profile"])
            results["errors"] = errors(results["pieces"])
        else:
            results = network_results(options, path)
        # Profiles come with all their samples: no line for each.
        save(results, path, indent=None if "pieces" in results else 1)
        text = table(part, results)
        if options.document is not None:
            write_between(options.document, f"bench_plan.py, {part}", text)
        print(text, flush=True)
        if part == "network":
            draw(results).savefig(path.with_suffix(".png"), dpi=110)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = usual_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rates", nargs="+", default=RATES, help="of the emulated network")
    parser.add_argument("--ranks", nargs="+", type=int, default=(2, 4))
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="queries x keys")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


# --------------------------------------------------------------------------------------------
# The paper's table


def published_results() -> dict[str, Any]:
    """The table beside the prediction, by how its bandwidths are read."""
    return {
        **header(predicted=True),
        "device": "6 A100 of 40 GB, 3 a node, from the data sheet",
        "units": "seconds of all 8 cross-attention layers, forward and backward",
        "records": {
            reading: [
                published.compare(row, published.cluster(both_ways=reading == "both ways"))
                for row in published.TABLE
            ]
            for reading in READINGS
        },
        # What their times say by themselves about the network.
        "least_bytes_per_s": [published.ring_bytes(row) / row.ring_s for row in published.TABLE],
    }


# --------------------------------------------------------------------------------------------
# Runs over an emulated network


def network_results(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Profile and runs for every rate and number of ranks; what is there already is replaced."""
    words = ["python", "launch/bench_plan.py", "--parts", "network"]
    words += ["--rates", *options.rates, "--ranks", *map(str, options.ranks)]
    results: dict[str, Any] = {**header(emulated=True, device="cpu"), "pieces": []}
    results["command"] = shlex.join([*words, "--repeats", str(options.repeats)])
    if path.exists():
        results["pieces"] = json.loads(path.read_text())["pieces"]
    for rate, ranks in product(options.rates, options.ranks):
        pieces = [p for p in results["pieces"] if (p["network"], p["ranks"]) != (rate, ranks)]
        pieces.append(measure_piece(rate, ranks, options))
        results["pieces"] = sorted(
            pieces, key=lambda p: (p["ranks"], Network.parse(p["network"]).bits_per_s)
        )
        save(results, path, indent=None)
    return {**results, "errors": errors(results["pieces"])}


def measure_piece(rate: str, ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Every shape's runs, and one profile of before and after them."""

    def calibrated() -> dict[str, Any]:
        found = calibrate.calibrate(Ranks.here(ranks, network=rate), quick=options.quick)
        return {**found, "answers": short(found["answers"])}

    before = calibrated()
    runs = [measure_runs(rate, ranks, shape, options) for shape in options.shapes]
    profile = pooled(before, calibrated())
    profile["command"] = f"ds-lvx plan --calibrate --ranks {ranks} --network {rate}"
    return {"network": rate, "ranks": ranks, "profile": profile, "runs": runs}


def measure_runs(rate: str, ranks: int, shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """`ds-lvx compare` on one shape: seconds by method."""
    queries, keys = shape.split("x")
    words = ["compare", "--network", rate, "--ranks", str(ranks)]
    words += ["--seqlen-q", queries, "--seqlen-kv", keys]
    words += ["--methods", "lvx", "ulysses", "ring", "none"]
    words += ["--warmup", "1", "--repeats", str(options.repeats), "--json"]
    print("ds-lvx", shlex.join(words), file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "ds_lvx.cli", *words], stdout=subprocess.PIPE, check=True, text=True
    )
    found = json.loads(done.stdout[done.stdout.index("{\n") :])  # DeepSpeed may have said something
    return {
        "command": shlex.join(["ds-lvx", *words]),
        "seqlen_q": int(queries),
        "seqlen_kv": int(keys),
        **{name: found["shape"][name] for name in ("heads", "kv_heads", "head_dim")},
        **{
            part: {record["method"]: record[part] for record in found["records"]}
            for part in ("step_s", "forward_s", "backward_s")
        },
    }


def call_of(piece: dict[str, Any], run: dict[str, Any]) -> tuple[AttentionShape, Cluster]:
    """What ran, and what the planner knows of where."""
    shape = AttentionShape(
        batch=1,
        q_lengths=split(run["seqlen_q"], piece["ranks"]),
        kv_lengths=split(run["seqlen_kv"], piece["ranks"]),
        **{name: run[name] for name in ("heads", "kv_heads", "head_dim")},
    )
    return shape, Cluster.of(piece["profile"]["cluster"])


def predict(piece: dict[str, Any], run: dict[str, Any], method: str) -> float:
    """Seconds of a step, from the profile and the shape alone."""
    return cost(*call_of(piece, run), method.replace("-", " "), settled=False).seconds


def comparisons(pieces: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every measured step beside its prediction."""
    return [
        {
            **case,
            "method": method,
            "measured_s": step_s["median"],
            "predicted_s": (predicted := predict(piece, run, method)),
            "error": abs(predicted - step_s["median"]) / step_s["median"],
        }
        for case, piece, run in _runs(pieces)
        for method, step_s in run["step_s"].items()
    ]


def chosen(pieces: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``auto`` takes, and its measured time over the best of all that share the sequence."""
    found = []
    for case, piece, run in _runs(pieces):
        name = cheapest(*call_of(piece, run)).name.replace(" ", "-")
        shared = {m: s["median"] for m, s in run["step_s"].items() if m != "none"}
        over_best = shared[name] / min(shared.values()) if name in shared else None
        found.append({**case, "method": name, "measured_over_best": over_best})
    return found


def _runs(
    pieces: Sequence[dict[str, Any]],
) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """What the results call a run, its piece, and itself."""
    return [
        ({name: {**piece, **run}[name] for name in CASE}, piece, run)
        for piece in pieces
        for run in piece["runs"]
    ]


def errors(pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median and worst error, over all and by method."""
    found = comparisons(pieces)

    def spread(method: str | None = None) -> dict[str, float]:
        own = [each["error"] for each in found if method in (None, each["method"])]
        return {"median": statistics.median(own), "worst": max(own)}

    methods = dict.fromkeys(each["method"] for each in found)
    return {
        "count": len(found),
        **spread(),
        "by_method": {method: spread(method) for method in methods},
        "comparisons": found,
        "auto": chosen(pieces),
    }


# --------------------------------------------------------------------------------------------
# Tables and plots


def table(part: str, results: dict[str, Any]) -> str:
    """Markdown."""
    return published_table(results) if part == "published" else network_table(results)


def published_table(results: dict[str, Any]) -> str:
    """One row for each line of the paper's table and each reading of its bandwidths."""
    cells = {
        "text": "{text_tokens}",
        "frames": "{frames}",
        "links read": "{reading}",
        "ring, s": "{ring_s:.2f}",
        "predicted ring": "{predicted_ring_s:.2f}",
        "LV-XAttn, s": "{lvx_s:.2f}",
        "predicted LV-XAttn": "{predicted_lvx_s:.2f}",
        "speed-up": "{speedup:.1f}",
        "predicted speed-up": "{predicted_speedup:.1f}",
        "predicted / published": "{predicted_over_published:.2f}",
    }
    rows = [
        {**each, "reading": reading}
        for reading, records in results["records"].items()
        for each in records
    ]
    return columns(rows, cells)


def network_table(results: dict[str, Any]) -> str:
    """One row for each rate, number of ranks and shape; measured and predicted by method."""
    whole = results["errors"]
    methods = whole["by_method"]
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for each in whole["comparisons"]:
        text = f"{each['measured_s'] * 1e3:.0f} / {each['predicted_s'] * 1e3:.0f}"
        cells.setdefault(tuple(str(each[name]) for name in CASE), {})[each["method"]] = text
    heads = (f"{method}, ms" for method in methods)
    rows = [["network", "ranks", "S_q", "S_kv", *heads, "auto takes", "auto / best"]]
    for (case, row), auto in zip(cells.items(), whole["auto"], strict=True):
        over = auto["measured_over_best"]
        last = [auto["method"], "-" if over is None else f"{over:.3f}"]
        rows.append([*case, *(row.get(method, "-") for method in methods), *last])
    for name in ("median", "worst"):
        own = (f"{methods[method][name]:.1%}" for method in methods)
        rows.append([f"{name} error", "", "", "", *own, "", ""])
    title = (
        f"Measured / predicted, milliseconds of a forward and backward, bf16, 8 heads of 64; "
        f"{whole['count']} comparisons: median error {whole['median']:.1%}, worst "
        f"{whole['worst']:.1%}. {results['hardware']['device']}; emulated network."
    )
    return f"{title}\n\n{markdown(rows)}"


def draw(results: dict[str, Any]) -> Figure:
    """Predicted against measured."""
    from matplotlib.figure import Figure  # whose import takes a second

    figure = Figure(figsize=(6, 5.5), layout="constrained")
    axes = figure.subplots()
    found = results["errors"]["comparisons"]
    for method in results["errors"]["by_method"]:
        own = [(e["measured_s"], e["predicted_s"]) for e in found if e["method"] == method]
        axes.plot(*zip(*own, strict=True), "o", markersize=5, label=method)
    measured = [each["measured_s"] for each in found]
    ends = [min(measured) / 2, 2 * max(measured)]
    axes.plot(ends, ends, color="grey", linewidth=0.8)
    low, high = ([share * end for end in ends] for share in (0.85, 1.15))
    axes.fill_between(ends, low, high, color="grey", alpha=0.2)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="measured over an emulated network, s",
        ylabel="predicted, s (band: 15%)",
        title="A forward and a backward of attention",
    )
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
