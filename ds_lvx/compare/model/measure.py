"""The part of ``ds-lvx compare`` that trains: ``--model``.

Every method trains the same model on the same batch, in fresh processes: first one step whose loss
and gradients have to agree, then steps that are timed, then steps that are broken down.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ds_lvx.compare.document import write_between
from ds_lvx.compare.fresh import run_fresh
from ds_lvx.compare.machine import header
from ds_lvx.compare.memory.measure import slowest, spread
from ds_lvx.compare.model.breakdown import COLUMNS, PHASES
from ds_lvx.compare.model.job import (
    DTYPES,
    METHODS,
    RANDOM,
    Job,
    check_checkpoint,
    cut,
    ds_config,
    text_heads,
)
from ds_lvx.compare.model.rank import Request
from ds_lvx.compare.model.report import draw, table
from ds_lvx.compare.network import MASTER, Lab, Network

TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}
"""Of losses, and of the norm of a parameter's gradient, relative."""
NEGLIGIBLE = 1e-2
"""A gradient smaller than this share of the largest is as good as this share."""
NEGLIGIBLE_ELSEWHERE = {"float32": NEGLIGIBLE, "bfloat16": 0.2}
"""The same between one process and several. On a CPU PyTorch's LayerNorm adds up the gradient of a
bias in 16 bits: over 16,000 tokens in one process it loses half of it, over 4,000 nothing yet."""


_THE_SAME = ("losses", "gradient_norms", "sizes")  # on all ranks


@dataclass(frozen=True)
class Plan:
    """How a job is compared.

    Attributes:
        job: what is trained.
        methods: of the cross-attention; ``none`` on one process, the others on ``ranks``.
        ranks: that share the sample; each is a process.
        warmup, repeats: steps; as many are broken down as are timed.
        overlap: transfers run under what is computed.
        network: between the ranks, each in a network namespace; None is this machine's own.
        threads: of a rank on a CPU.
        device: ``"cpu"``, or the name of this machine's accelerator.
        timeout_s: for all steps of a method.
    """

    job: Job
    methods: Sequence[str]
    ranks: int = 4
    warmup: int = 1
    repeats: int = 5
    overlap: bool = True
    network: Network | None = None
    threads: int = 1
    device: str = "cpu"
    timeout_s: float = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a model, beside those that all comparisons share."""
    group = parser.add_argument_group(
        "with --model", "tiny, mllama (Llama-3.2-11B-Vision with random weights), or a checkpoint"
    )
    group.add_argument("--frames", type=int, default=32, help="of the sample")
    group.add_argument("--text-tokens", type=int, default=256, help="of the sample")
    for name, what in (
        ("hidden", "width of the text model"),
        ("cross-layers", "cross-attention layers"),
        ("self-layers", "the text's other layers"),
        ("vision-layers", "local layers of the vision tower"),
    ):
        group.add_argument(f"--{name}", type=int, help=f"{what}; of random weights only")
    group.add_argument("--zero-stage", type=int, choices=range(4), default=2)
    group.add_argument("--text-method", choices=("ulysses", "ring"), default="ulysses")
    group.add_argument("--checkpointing", action="store_true", help="of the layers")
    group.add_argument("--freeze-vision", action="store_true", help="train the rest only")


def run(options: argparse.Namespace) -> int:
    """Compare as the options say; prints a table or the JSON, and writes the files.

    Returns:
        0, or 1 where methods disagree: what differs is printed, and what follows is not measured.

    Raises:
        ValueError: options that do not fit each other.
        RunError: a rank failed.
        NetworkError: the network cannot be made here.
    """
    results = compare(plan_of(options), say=lambda line: print(line, file=sys.stderr, flush=True))
    show(results, options)
    return 1 if results["disagreements"] else 0


def show(results: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Print the table or the JSON, what methods disagree on, and write the files."""
    if options.output is not None:
        write(results, options.output)
    if options.document is not None and not results["disagreements"]:
        mark = f"ds-lvx compare, {name_of(results)}"
        write_between(options.document, mark, table(results))
    print(json.dumps(results, indent=1) if options.json else table(results))
    for line in results["disagreements"]:
        print(f"ds-lvx compare: {line}", file=sys.stderr)


def plan_of(options: argparse.Namespace) -> Plan:
    """The plan of a command line.

    Raises:
        ValueError: options that do not fit each other.
    """
    case = RANDOM.get(options.model)
    sizes = {
        name: getattr(options, name)
        for name in ("hidden", "cross_layers", "self_layers", "vision_layers")
    }
    if case is None:
        given = [
            f"--{name.replace('_', '-')}" for name, value in sizes.items() if value is not None
        ]
        if given:
            raise ValueError(
                f"--model: got {options.model} with {', '.join(given)}; expected these only with "
                f"random weights ({', '.join(RANDOM)}): a checkpoint has its own sizes"
            )
        check_checkpoint(options.model)
    else:
        case = replace(cut(case, **sizes), text_tokens=options.text_tokens)
    job = Job(
        model=options.model,
        case=case,
        frames=options.frames,
        text_tokens=options.text_tokens,
        dtype=options.dtype,
        zero_stage=options.zero_stage,
        text_method=options.text_method,
        recompute=options.recompute,
        checkpointing=options.checkpointing,
        freeze_vision=options.freeze_vision,
    )
    plan = Plan(
        job,
        tuple(options.methods),
        ranks=options.ranks,
        warmup=options.warmup,
        repeats=options.repeats,
        overlap=options.overlap,
        network=options.network,
        threads=options.threads,
        device=options.device,
        timeout_s=options.timeout_s,
    )
    check(plan)
    return plan


def check(plan: Plan) -> None:
    """Raise a ValueError for a plan that cannot be run."""
    job = plan.job
    for name in plan.methods:
        if name not in METHODS:
            raise ValueError(f"--methods: got {name!r}; expected some of: {', '.join(METHODS)}")
    if job.dtype not in DTYPES:
        raise ValueError(f"--dtype: got {job.dtype}; expected {' or '.join(DTYPES)} with --model")
    least = {"--frames": job.frames, "--text-tokens": job.text_tokens}
    for option, value in least.items():
        if value < plan.ranks:
            raise ValueError(
                f"{option}: got {value} for {plan.ranks} ranks; expected at least one a rank"
            )
    if plan.ranks < 1 or plan.warmup < 0 or plan.repeats < 1:
        raise ValueError(
            f"got {plan.ranks} ranks, {plan.warmup} steps to warm up, {plan.repeats} repeats; "
            "expected at least 1, 0 and 1"
        )


def skipped(plan: Plan) -> dict[str, str]:
    """Methods that cannot do the job, and why."""
    heads = text_heads(plan.job)
    if heads >= plan.ranks:
        return {}
    why = f"{heads} query heads for {plan.ranks} ranks"
    of_text_too = plan.job.case is None or plan.job.case.self_layers > 0
    if plan.job.text_method == "ulysses" and of_text_too:
        return {name: f"{why}, in the text" for name in plan.methods if name != "none"}
    return {name: why for name in plan.methods if name == "ulysses"}


def compare(plan: Plan, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the job by every method.

    Returns:
        For the JSON: ``records``, one a method, with every sample of every rank; and
        ``disagreements``, lines about methods whose losses or gradients differ.

    Raises:
        RunError: a rank failed.
        NetworkError: the network cannot be made here.
    """
    head = header(emulated=plan.network is not None, device=plan.device)
    left_out = skipped(plan)
    records: list[dict[str, Any]] = []
    for method in plan.methods:
        if method in left_out:
            say(f"{method}: skipped: {left_out[method]}")
            continue
        records.append(_measured(plan, method))
        say(f"{method}: {records[-1]['step_s']['median']:.3f} s a step")
        if disagreements(records, dtype=plan.job.dtype):
            break
    return {**head, "load_average_after": os.getloadavg(), **results_of(plan, records, left_out)}


def results_of(
    plan: Plan, records: Sequence[Mapping[str, Any]], left_out: Mapping[str, str]
) -> dict[str, Any]:
    """The part of what `compare` returns that is about the job and the methods."""
    return {
        "job": asdict(plan.job),
        "plan": {
            "ranks": plan.ranks,
            "threads_per_rank": plan.threads,
            "warmup": plan.warmup,
            "repeats": plan.repeats,
            "overlap": plan.overlap,
            "network": None if plan.network is None else str(plan.network),
        },
        "skipped": dict(left_out),
        "disagreements": disagreements(records, dtype=plan.job.dtype),
        "records": list(records),
    }


def _measured(plan: Plan, method: str) -> dict[str, Any]:
    ranks = 1 if method == "none" else plan.ranks
    request = asdict(
        Request(plan.job, method, warmup=plan.warmup, repeats=plan.repeats, overlap=plan.overlap)
    )
    lab = None if plan.network is None else Lab(plan.network, ranks=ranks, name=f"lvx{os.getpid()}")
    with nullcontext() if lab is None else lab:
        answers = run_fresh(
            "ds_lvx.compare.model.rank",
            request,
            ranks=ranks,
            threads=plan.threads,
            timeout_s=plan.timeout_s,
            environment={"DS_ACCELERATOR": "cpu"} if plan.device == "cpu" else {},
            places=None if lab is None else lab.places(),
            master="127.0.0.1" if lab is None else MASTER,
        )
    return {"ds_config": ds_config(plan.job, method, ranks=ranks), **record(method, answers)}


def record(method: str, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the ranks of one method found, put together.

    A broken-down step is that of the rank which took longest; ``typical`` is the one whose length
    is the median, so that its parts add up.
    """
    by_step = list(zip(*(answer["broken_down"] for answer in answers), strict=True))
    slowest_ranks = [max(ranks, key=lambda sample: sample["whole_s"]) for ranks in by_step]
    in_order = sorted(slowest_ranks, key=lambda sample: sample["whole_s"])
    sums = [_sum(sample) / sample["whole_s"] for ranks in by_step for sample in ranks]
    return {
        "method": method,
        "ranks": len(answers),
        "sizes": answers[0]["sizes"],
        "losses": answers[0]["losses"],
        "gradient_norms": answers[0]["gradient_norms"],
        "step_s": spread(slowest(answers, "step_s")),
        "attention_bytes": max(max(answer["attention_bytes"]) for answer in answers),
        "typical": in_order[(len(in_order) - 1) // 2],
        "parts_s": _parts(slowest_ranks),
        "sum_of_parts_over_whole": [min(sums), max(sums)],
        "answers": [
            {key: value for key, value in answer.items() if key not in _THE_SAME}
            for answer in answers
        ],
    }


def _sum(sample: Mapping[str, Any]) -> float:
    return sum(sum(columns.values()) for columns in sample["parts_s"].values())


def _parts(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median, percentiles and samples of every part of the slowest ranks."""
    return {
        phase: {
            column: spread([sample["parts_s"][phase][column] for sample in samples])
            for column in COLUMNS
        }
        | {"hidden": spread([sample["hidden_s"][phase] for sample in samples])}
        for phase in PHASES
    }


def disagreements(records: Sequence[Mapping[str, Any]], *, dtype: str) -> list[str]:
    """Where losses or gradients differ from those of the first method, in lines."""
    lines: list[str] = []
    for other in records[1:]:
        lines += _losses_apart(records[0], other, TOLERANCES[dtype])
        lines += _gradients_apart(records[0], other, dtype)
    return lines


def _losses_apart(one: Mapping[str, Any], other: Mapping[str, Any], tolerance: float) -> list[str]:
    pairs = zip(one["losses"], other["losses"], strict=True)
    for step, (a, b) in enumerate(pairs, start=1):
        if not abs(a - b) <= tolerance * abs(a):
            return [
                f"{one['method']} and {other['method']} disagree on the loss of step {step}: "
                f"{a:.6g} and {b:.6g} (expected a difference of at most {tolerance:.2g} of it)"
            ]
    return []


def _gradients_apart(one: Mapping[str, Any], other: Mapping[str, Any], dtype: str) -> list[str]:
    tolerance = TOLERANCES[dtype]
    share = NEGLIGIBLE if one["ranks"] == other["ranks"] else NEGLIGIBLE_ELSEWHERE[dtype]
    negligible = share * max(one["gradient_norms"].values(), default=0.0)
    found = []
    for name, a in one["gradient_norms"].items():
        b = other["gradient_norms"].get(name, float("nan"))
        error = abs(a - b) / max(a, negligible, 1e-30)
        if not error <= tolerance:
            found.append((error, name, a, b))
    if not found:
        return []
    error, name, a, b = max(found, key=lambda item: item[0])
    return [
        f"{one['method']} and {other['method']} disagree on the gradients of {len(found)} "
        f"parameters, most on {name}: norms {a:.6g} and {b:.6g} (expected a difference of at most "
        f"{tolerance:.2g} of it)"
    ]


def write(results: Mapping[str, Any], folder: Path) -> None:
    """The JSON, and the plot where methods agree; matplotlib draws it, where it is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name_of(results)}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    if results["disagreements"]:
        return
    try:
        draw(results).savefig(path.with_suffix(".png"), dpi=110)
    except ModuleNotFoundError as error:
        print(f"no plot: {error}; pip install 'ds_lvx[plots]'", file=sys.stderr)


def name_of(results: Mapping[str, Any]) -> str:
    """A name for the files of a comparison, from what was compared."""
    job, plan = results["job"], results["plan"]
    words = ["compare-model", Path(job["model"]).name, f"ranks{plan['ranks']}"]
    words += ["recompute"] * job["recompute"] + ["no-overlap"] * (not plan["overlap"])
    if plan["network"] is not None:
        words.append(plan["network"].replace(",", "-"))
    return "-".join(words)
