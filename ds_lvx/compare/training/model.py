"""The subject of ``ds-lvx compare --model``: a whole training step by every method.

Every method trains the same model on the same batch, in fresh processes: first one step whose loss
and gradients have to agree, then steps that are timed, then steps that are broken down.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ds_lvx.compare.case import DTYPES, case_of, cut, random_case, random_models
from ds_lvx.compare.document import Cells, Results, columns, percentiles, times
from ds_lvx.compare.harness import GATHERED, Ranks, on_ranks, slowest, spread
from ds_lvx.compare.machine import header
from ds_lvx.compare.training.breakdown import PHASES
from ds_lvx.compare.training.rank import Task, finetune

TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}
"""Of losses, and of the norm of a parameter's gradient, relative."""
NEGLIGIBLE = 1e-2
"""A gradient smaller than this share of the largest is as good as this share."""
NEGLIGIBLE_ELSEWHERE = {"float32": NEGLIGIBLE, "bfloat16": 0.2}
"""The same between one process and several. On a CPU PyTorch's LayerNorm adds up the gradient of a
bias in 16 bits: over 16,000 tokens in one process it loses half of it, over 4,000 nothing yet."""

_CUTS = {
    "hidden": "width of the text model",
    "cross_layers": "cross-attention layers",
    "self_layers": "the text's other layers",
    "vision_layers": "local layers of the vision tower",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a model, beside those that all comparisons share."""
    group = parser.add_argument_group(
        "with --model", f"{', '.join(random_models())} (random weights), or a checkpoint"
    )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the checkpoint"
    )
    group.add_argument("--frames", type=int, default=32, help="of the sample")
    group.add_argument("--text-tokens", type=int, default=256, help="of the sample")
    for name, what in _CUTS.items():
        group.add_argument(_option(name), type=int, help=f"{what}; of random weights only")
    group.add_argument("--zero-stage", type=int, choices=range(4), default=2)
    group.add_argument("--text-method", choices=("ulysses", "ring"), default="ulysses")
    group.add_argument("--checkpointing", action="store_true", help="of the layers")
    group.add_argument("--freeze-vision", action="store_true", help="train the rest only")


def task_of(options: argparse.Namespace, *, ranks: int) -> Task:
    """What a command line asks for, by ``ranks`` ranks; of no method yet.

    Raises:
        ValueError: options that do not fit each other.
    """
    sizes = {name: getattr(options, name) for name in _CUTS}
    random = random_models()
    if options.model in random:
        case = cut(random_case(options.model), **sizes)
    else:
        given = [_option(name) for name, value in sizes.items() if value is not None]
        if given:
            raise ValueError(
                f"--model: got {options.model} with {', '.join(given)}; expected these only with "
                f"random weights ({', '.join(random)}): a checkpoint has its own sizes"
            )
        case = case_of(options.model, trust_remote_code=options.trust_remote_code)
    for name in ("frames", "text_tokens"):
        got = getattr(options, name)
        if got < ranks:
            raise ValueError(
                f"{_option(name)}: got {got} for {ranks} ranks; expected at least one a rank"
            )
    if options.dtype not in DTYPES:
        known = " or ".join(DTYPES)
        raise ValueError(f"--dtype: got {options.dtype}; expected {known} with --model")
    case = replace(case, text_tokens=options.text_tokens)
    if options.freeze_vision:
        case = replace(case, features="trained")
    what = ("frames", "dtype", "zero_stage", "text_method", "recompute", "checkpointing")
    how = ("overlap", "warmup", "repeats")
    return Task(
        options.model,
        case,
        checkpoint=options.model not in random,
        **{name: getattr(options, name) for name in (*what, *how)},
    )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def skipped(task: Task, methods: Sequence[str], *, ranks: int) -> dict[str, str]:
    """Methods that cannot do the task, and why."""
    if task.case.heads >= ranks:
        without = task.case.contract().without
        return {name: without[name] for name in methods if name in without}
    why = f"{task.case.heads} query heads for {ranks} ranks"
    if task.text_method == "ulysses" and task.case.self_layers > 0:
        return {name: f"{why}, in the text" for name in methods if name != "none"}
    return {name: why for name in methods if name in ("ulysses", GATHERED)}


def compare(
    task: Task, methods: Sequence[str], ranks: Ranks, *, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Train by every method, ``none`` on one process, the others on all ranks.

    ``say`` gets a line about every method.

    Returns:
        For the JSON: ``records``, one a method, with every sample of every rank; and
        ``disagreements``, lines about methods whose losses or gradients differ.

    Raises:
        RunError: a rank failed.
        NetworkError: the network cannot be made here.
    """
    head = header(emulated=ranks.network is not None, device=ranks.device)
    left_out = skipped(task, methods, ranks=ranks.count)
    records: list[dict[str, Any]] = []
    for method in methods:
        if method in left_out:
            say(f"{method}: skipped: {left_out[method]}")
            continue
        own = replace(task, method=method)
        where = replace(ranks, count=1 if method == "none" else ranks.count)
        found = record(method, on_ranks(finetune, own, where))
        records.append({"ds_config": own.ds_config(ranks=where.count), **found})
        say(f"{method}: {found['step_s']['median']:.3f} s a step")
        if disagreements(records, dtype=task.dtype):
            break
    found = results_of(task, ranks, records, left_out)
    return {**head, "load_average_after": os.getloadavg(), **found}


def results_of(
    task: Task,
    ranks: Ranks,
    records: Sequence[Mapping[str, Any]],
    left_out: Mapping[str, str],
) -> dict[str, Any]:
    """The part of what `compare` returns that is about the task and the methods."""
    sizes = {
        "visual_tokens": task.frames * task.case.frame_tokens,
        "text_tokens": task.case.text_tokens,
        "visual_tokens_of_a_frame": task.case.frame_tokens,
    }
    return {
        "job": asdict(task),
        "plan": {
            "ranks": ranks.count,
            "threads_per_rank": ranks.threads,
            "warmup": task.warmup,
            "repeats": task.repeats,
            "overlap": task.overlap,
            "network": None if ranks.network is None else str(ranks.network),
        },
        "skipped": dict(left_out),
        "disagreements": disagreements(records, dtype=task.dtype),
        "records": [{**each, "sizes": sizes} for each in records],
    }


def record(method: str, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the ranks of one method found, put together.

    A broken-down step is that of the rank which took longest; ``typical`` is the one whose length
    is the median, so that its parts add up.
    """
    by_step = list(zip(*(answer["broken_down"] for answer in answers), strict=True))
    in_order = sorted(
        (max(ranks, key=lambda sample: sample["whole_s"]) for ranks in by_step),
        key=lambda sample: sample["whole_s"],
    )
    sums = [
        sum(sum(parts.values()) for parts in sample["parts_s"].values()) / sample["whole_s"]
        for ranks in by_step
        for sample in ranks
    ]
    the_same = ("losses", "gradient_norms")  # on all ranks
    own = [{k: value for k, value in each.items() if k not in the_same} for each in answers]
    return {
        "method": method,
        "ranks": len(answers),
        **{name: answers[0][name] for name in the_same},
        "step_s": spread(slowest(*(answer["step_s"] for answer in answers))),
        "attention_bytes": max(max(answer["attention_bytes"]) for answer in answers),
        "typical": in_order[(len(in_order) - 1) // 2],
        "sum_of_parts_over_whole": [min(sums), max(sums)],
        "answers": own,
    }


def disagreements(records: Sequence[Mapping[str, Any]], *, dtype: str) -> list[str]:
    """Where losses or gradients differ from those of the first method, in lines."""

    def losses(of: Mapping[str, Any]) -> dict[str, float]:
        return {f"step {number}": loss for number, loss in enumerate(of["losses"], start=1)}

    lines: list[str] = []
    for one, other in ((records[0], each) for each in records[1:]):
        share = NEGLIGIBLE if one["ranks"] == other["ranks"] else NEGLIGIBLE_ELSEWHERE[dtype]
        norms, others = one["gradient_norms"], other["gradient_norms"]
        least = share * max(norms.values(), default=0.0)
        tolerance = TOLERANCES[dtype]
        for what, apart in {
            "losses": _apart(losses(one), losses(other), least=0.0, tolerance=tolerance),
            "norms of gradients": _apart(norms, others, least=least, tolerance=tolerance),
        }.items():
            if apart:
                lines.append(f"{one['method']} and {other['method']} disagree on {what}: {apart}")
    return lines


def _apart(
    values: Mapping[str, float], others: Mapping[str, float], *, least: float, tolerance: float
) -> str:
    """How many differ, and where most; empty where none does. NaN differs, and what is missing."""
    pairs = {name: (a, others.get(name, float("nan"))) for name, a in values.items()}
    errors = {name: abs(a - b) / max(abs(a), least, 1e-30) for name, (a, b) in pairs.items()}
    found = [name for name, error in errors.items() if not error <= tolerance]
    if not found:
        return ""
    name = max(found, key=lambda name: errors[name])
    a, b = pairs[name]
    return (
        f"{len(found)} of {len(values)}, most on that of {name}: {a:.6g} and {b:.6g} (expected a "
        f"difference of at most {tolerance:.2g} of it)"
    )


# ---- the report

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


def name(results: Results) -> str:
    """A name for the files of a comparison, from what was compared."""
    job, plan = results["job"], results["plan"]
    words = ["compare-model", Path(job["model"]).name, f"ranks{plan['ranks']}"]
    words += ["recompute"] * job["recompute"] + ["no-overlap"] * (not plan["overlap"])
    if plan["network"] is not None:
        words.append(plan["network"].replace(",", "-"))
    return "-".join(words)


def text(results: Results) -> str:
    """A title, and a line a method; parts are those of the step of median length."""
    ring = next((r["step_s"]["median"] for r in results["records"] if r["method"] == "ring"), None)

    def part(*bars: str) -> Callable[[Any], str]:
        return lambda r: f"{sum(totals(r['typical'])[bar] for bar in bars):.3f}"

    cells: Cells = {
        "method": "{method}",
        "step, s": lambda r: percentiles(r["step_s"]),
        "x ring": lambda r: times(None if ring is None else ring / r["step_s"]["median"]),
        "cross-attention, s": part("cross-attention", "waiting in cross-attention"),
        "of it waiting": part("waiting in cross-attention"),
        "text": part("text"),
        "vision": part("vision"),
        "waiting elsewhere": part("waiting elsewhere"),
        "rest": part("rest"),
        "hidden": lambda r: f"{sum(r['typical']['hidden_s'].values()):.3f}",
        "attention sends, MB": lambda r: f"{r['attention_bytes'] / 1e6:.2f}",
    }
    left_out = [f"{method} was skipped: {why}." for method, why in results["skipped"].items()]
    return "\n\n".join([_title(results), columns(results["records"], cells), *left_out])


def _title(results: Results) -> str:
    job, plan = results["job"], results["plan"]
    found: Mapping[str, int] = next((record["sizes"] for record in results["records"]), {})
    network = plan["network"]
    where = "" if network is None else f", over an emulated network of {network} a rank"
    return (
        f"A training step of {Path(job['model']).name}: {found.get('visual_tokens', 0):,} visual "
        f"tokens, {found.get('text_tokens', 0):,} text tokens, {job['dtype']}, ZeRO stage "
        f"{job['zero_stage']}, text by {job['text_method']}; {plan['ranks']} ranks (none: 1)"
        f"{where}. Median (10th to 90th percentile) of {plan['repeats']}. "
        f"{results['hardware']['device']}."
    )


def totals(sample: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a broken-down step by kind, all phases together."""
    parts = sample["parts_s"]
    return {
        bar: sum(parts[phase][column] for phase in PHASES for column in kinds)
        for bar, (kinds, _) in _BARS.items()
    }


def draw(results: Results) -> Any:
    """One bar a method, forward below, backward and optimizer above; like the paper's figure 2."""
    if results["disagreements"]:
        return None
    from matplotlib.figure import Figure  # of the extra "plots"
    from matplotlib.patches import Patch

    steps = {record["method"]: record["typical"]["parts_s"] for record in results["records"]}
    figure = Figure(figsize=(2.2 + 1.5 * len(steps), 5.2), layout="constrained")
    axes = figure.subplots()
    heights = np.zeros(len(steps))
    for phase, (kinds, colour) in itertools.product(PHASES, _BARS.values()):
        seconds = [sum(step[phase][column] for column in kinds) for step in steps.values()]
        look: Any = {"color": colour, "hatch": _HATCHES[phase], "edgecolor": "white"}
        bars = axes.bar([*steps], seconds, 0.6, heights, linewidth=0.5, **look)
        heights = heights + seconds
    axes.bar_label(bars, [f"{height:.3g} s" for height in heights], fontsize=9)
    axes.set_ylabel("seconds of the slowest rank")
    axes.margins(y=0.08)
    axes.set_title(_title(results).replace("; ", ";\n", 1).replace(". ", ".\n", 1), fontsize=8)
    legend = [Patch(facecolor=colour, label=bar) for bar, (_, colour) in _BARS.items()]
    grey: Any = {"facecolor": "white", "edgecolor": "gray"}
    legend += [Patch(**grey, hatch=hatch, label=phase) for phase, hatch in _HATCHES.items()]
    axes.legend(handles=legend[::-1], fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
