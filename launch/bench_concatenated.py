"""Measure models whose visual tokens stand among the text's against gathered embeddings.

    sudo -E env "PATH=$PATH" python launch/bench_concatenated.py --document docs/concatenated.md
    python launch/bench_concatenated.py --quick --network none --output_dir /tmp/concatenated

Two models with random weights, four ranks, an emulated network of 200 Mbit/s (root): steps by every
method (`ds_lvx.compare.training.model`), and the peak of a rank's memory over frames. Some seven
minutes on two cores that do nothing else. Writes concatenated.json and .png into --output_dir.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.peak import PROMPT_FREEING, meter
from bench.script import leave, measured, told, usual_parser
from bench.weigh import Weighing, weigh
from ds_lvx.compare.case import Case, random_case, random_models
from ds_lvx.compare.document import Cells, Results, columns, markdown, percentiles, times
from ds_lvx.compare.harness import GATHERED, Ranks, on_ranks
from ds_lvx.compare.machine import header
from ds_lvx.compare.network import Network
from ds_lvx.compare.training import model
from ds_lvx.compare.training.rank import Task
from ds_lvx.models.concatenated.family import Concatenated
from ds_lvx.plan.memory import Setting

METHODS = (GATHERED, "ulysses", "lvx-gather")
WEIGHED = (GATHERED, "ulysses")
WHERE = {
    GATHERED: "gathered, then Ulysses",
    "ulysses": "at home, Ulysses",
    "lvx-gather": "at home, lvx",
}
"""Where embeddings are, and how the text attends."""
MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """What is measured: names and sizes of models, and how much of it."""

    tasks: Mapping[str, Task]  # by name, of no method yet
    weighed: Case  # the model whose memory is measured
    frames: tuple[int, ...]  # of a rank, by step


def first_model() -> str:
    """The first family whose visual tokens stand among the text's."""
    names = random_models()
    return next(n for n in names if isinstance(random_case(n).contract(), Concatenated))


def case_of(hidden: int, heads: int, kv_heads: int, layers: int, **more: Any) -> Case:
    """A model of a size, with a small tower."""
    sizes = {"hidden": hidden, "heads": heads, "kv_heads": kv_heads, "cross_layers": layers}
    tower = {"vision_hidden": 256, "vision_heads": 4, "vision_mlp": 512, "vision_layers": 2}
    own = {"head_dim": 64, "mlp": 8 * hidden // 3, "vocabulary": 512, "text_tokens": 256}
    return replace(random_case(first_model()), **{**sizes, **tower, **own, **more})


def plan_of(options: argparse.Namespace) -> Plan:
    """What is measured."""
    tiny = case_of(256, 4, 2, 2)
    # With the gradients of all weights these links would carry little else.
    middle = case_of(768, 12, 4, 4, trains="kv", features="trained")
    # In 16 bits a CPU takes half a minute for the gradient of the tower's convolution.
    how: Any = {"dtype": "float32", "recompute": False}
    if options.quick:
        tiny = case_of(256, 4, 2, 1, text_tokens=32, vision_hidden=32, vision_layers=1)
        task = Task(first_model(), tiny, frames=4, warmup=0, repeats=1, **how)
        return Plan({"tiny": task}, replace(tiny, features="trained"), (1, 2))
    tasks = {
        "tiny": Task(first_model(), tiny, frames=8, warmup=1, repeats=3, **how),
        "mid-sized": Task(first_model(), middle, frames=8, warmup=0, repeats=2, **how),
    }
    return Plan(tasks, replace(middle, cross_layers=2), (1, 2, 4))


def measure(plan: Plan, ranks: Ranks, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """For the JSON: ``steps`` by model, and ``memory``.

    Raises:
        RunError: a rank failed.
        NetworkError: the network cannot be made here.
        ValueError: methods disagree on losses or gradients.
    """
    head = header(emulated=ranks.network is not None, device=ranks.device)
    steps = {}
    for name, task in plan.tasks.items():
        say(f"{name} ...")
        found = model.compare(task, METHODS, ranks, say=say)
        if found["disagreements"]:
            raise ValueError("\n".join(found["disagreements"]))
        steps[name] = {key: found[key] for key in ("job", "plan", "records")}
    return {**head, "steps": steps, "memory": _weigh(plan, ranks, say=say)}


def _weigh(plan: Plan, ranks: Ranks, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Peak and frames of the rank that needs most, by method."""
    where = replace(ranks, network=None, environment=PROMPT_FREEING)
    setting = Setting("ulysses", checkpointing=True)
    records = []
    for method in WEIGHED:
        load = Weighing(plan.weighed, setting, (1, *plan.frames), gathered=method == GATHERED)
        by_rank = on_ranks(weigh, load, where)
        peaks = [max(step) for step in zip(*(r["peak_bytes"] for r in by_rank), strict=True)]
        records.append({"method": method, "peak_bytes": peaks, "ranks": by_rank})
        say(f"{method}: {', '.join(f'{peak / MIB:,.0f}' for peak in peaks)} MiB")
    return {
        "measured_by": meter(ranks.device).source,
        "case": asdict(plan.weighed),
        "frames": [ranks.count * frames for frames in plan.frames],
        "tokens_of_a_frame": plan.weighed.frame_tokens,
        "ranks": ranks.count,
        "records": records,
    }


# ---- the report


def name(results: Results) -> str:
    """``concatenated``."""
    return "concatenated"


def text(results: Results) -> str:
    """Tables of steps and of memory, and the plot where a document has it."""
    first = next(iter(results["steps"].values()))["plan"]
    network = first["network"]
    over = "" if network is None else f" over an emulated network of {network} a rank"
    title = (
        f"A training step on {first['ranks']} ranks{over}. Median (10th to 90th percentile). "
        f"{results['hardware']['device']}."
    )
    steps = [_steps(size, found) for size, found in results["steps"].items()]
    picture = f"![Steps by method, and memory over frames](benchmarks/{name(results)}.png)"
    return "\n\n".join([title, *steps, _memory(results["memory"]), picture])


def _steps(size: str, found: Mapping[str, Any]) -> str:
    records, job = found["records"], found["job"]
    case, sizes = job["case"], records[0]["sizes"]
    peer = next(r["step_s"]["median"] for r in records if r["method"] == GATHERED)

    def waits(record: Mapping[str, Any]) -> str:
        parts = model.totals(record["typical"])
        return f"{parts['waiting in cross-attention'] + parts['waiting elsewhere']:.3f}"

    cells: Cells = {
        "embeddings": lambda r: WHERE[r["method"]],
        "step, s": lambda r: percentiles(r["step_s"]),
        "x gathered": lambda r: times(peer / r["step_s"]["median"]),
        "of it waiting, s": waits,
        "attention and embeddings send, MB": lambda r: f"{r['attention_bytes'] / 1e6:.2f}",
        "a rank sends in all, MB": _interface,
    }
    title = (
        f"{size}: {case['cross_layers']} layers of {case['hidden']}, {case['heads']} heads, "
        f"{case['kv_heads']} of K and V; {sizes['visual_tokens']:,} visual tokens in "
        f"{job['frames']} frames, {sizes['text_tokens']:,} of text; {job['dtype']}, "
        f"{_TRAINS[case['trains']]}."
    )
    return f"{title}\n\n{columns(records, cells)}"


_TRAINS = {"all": "all weights train", "kv": "projections of K and V and the merger train"}


def _interface(record: Mapping[str, Any]) -> str:
    sent = [answer["interface_bytes"] for answer in record["answers"]]
    if any(each is None for steps in sent for each in steps):
        return "-"
    return f"{max(statistics.median(steps) for steps in sent) / 1e6:.1f}"


def _memory(found: Mapping[str, Any]) -> str:
    each = found["tokens_of_a_frame"]
    heads = [f"{frames} frames ({frames * each:,} tokens)" for frames in found["frames"]]
    rows = [
        [WHERE[record["method"]], *(f"{peak / MIB:,.0f}" for peak in record["peak_bytes"])]
        for record in found["records"]
    ]
    title = (
        f"Peak of a rank's memory in a step above what was there before, MiB; {found['ranks']} "
        f"ranks, {found['case']['cross_layers']} checkpointed layers of {found['case']['hidden']}."
    )
    return f"{title}\n\n{markdown([['embeddings', *heads], *rows])}"


def draw(results: Results) -> Any:
    """Steps by model and method, and memory over frames."""
    from matplotlib.figure import Figure  # of the extra "plots"

    found, memory = results["steps"], results["memory"]
    figure = Figure(figsize=(4.2 * (len(found) + 1), 3.6), layout="constrained")
    *left, right = figure.subplots(1, len(found) + 1)
    for axes, (size, each) in zip(left, found.items(), strict=True):
        names = [WHERE[r["method"]].replace(", ", ",\n") for r in each["records"]]
        seconds = [r["step_s"]["median"] for r in each["records"]]
        bars = axes.bar(names, seconds, 0.6, color=["C1", "C0", "C2"][: len(names)])
        axes.bar_label(bars, fmt="%.3g s", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.margins(y=0.12)
        axes.set(title=f"{size}: seconds of a step")
    for record in memory["records"]:
        peaks = [peak / MIB for peak in record["peak_bytes"]]
        right.plot(memory["frames"], peaks, "o-", label=WHERE[record["method"]])
    right.set(xlabel="frames", ylabel="MiB at the peak", ylim=(0, None), title="memory of a rank")
    right.legend(fontsize=8)
    return figure


def main() -> None:
    """Measure, or read the JSON, and write JSON, plot and tables."""
    parser = usual_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--network", default="200mbit", help="RATE[,LATENCY], or none")
    options = parser.parse_args()
    with told("bench_concatenated"):
        network = None if options.network == "none" else Network.parse(options.network)
        ranks = Ranks(options.ranks, network=network)
        results = measured("concatenated", options, lambda: measure(plan_of(options), ranks))
        leave("bench_concatenated", sys.modules[__name__], results, options)


if __name__ == "__main__":
    main()
