"""Measure generation by ranks and visual tokens, against one process and against the planner.

    python launch/bench_generate.py                        8K to 512K tokens on 1, 2 and 4 ranks
    python launch/bench_generate.py --network 200mbit      an emulated network (needs root)
    python launch/bench_generate.py --quick --output_dir /tmp/generate    tiny shapes

Writes generate.json and generate.png into --output_dir, and a table into --document. Where there
are GPUs, each rank takes one.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

import torch

from bench import generation
from bench.script import leave, measured, told, usual_parser
from ds_lvx.compare.case import DTYPES, Case
from ds_lvx.compare.decoding import Job
from ds_lvx.compare.document import save_unfinished
from ds_lvx.compare.harness import Ranks
from ds_lvx.compare.machine import header
from ds_lvx.plan.generation_memory import Share
from ds_lvx.plan.units import at_least, count

MODEL = Case(
    hidden=512, heads=4, kv_heads=4, cross_layers=2, self_layers=2, mlp=1024, text_tokens=64
)
SIZES = ("8K", "32K", "128K", "512K")
QUICK = replace(MODEL, hidden=64, heads=4, kv_heads=2, mlp=64, text_tokens=16)


def main() -> None:
    """Measure, then write JSON, plot and table."""
    options = parse_options()
    with told("bench_generate"):
        name = generation.name({"network": options.network})
        results = measured(name, options, lambda: measure(options))
        leave("bench_generate", generation, results, options)


def parse_options() -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = usual_parser(__doc__)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 2, 4])
    add("--tokens", nargs="+", default=SIZES, help="visual tokens of the sample")
    add("--new_tokens", type=int, default=24, help="that are timed")
    add("--dtype", choices=DTYPES, default="bfloat16" if cuda else "float32")
    add("--budget_gib", type=float, default=14.0, help="of all ranks; larger runs are left out")
    add("--network", metavar="RATE[,LATENCY]", help="an emulated one, such as 1gbit,0.1ms")
    add("--threads", type=int, help="of a rank (default: its share of the cores)")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All numbers of ranks with all sizes; what is too large is left out, and named.

    Raises:
        ValueError: options that this machine cannot do.
    """
    at_least(1, ranks=min(options.ranks))
    if options.new_tokens < 1:
        raise ValueError(f"--new_tokens: got {options.new_tokens}; expected at least 1")
    job = Job(QUICK if options.quick else MODEL, (), options.new_tokens, options.dtype)
    most = Ranks.here(max(options.ranks), options.threads, network=options.network)
    network = None if most.network is None else str(most.network)
    head = header(emulated=network is not None, device=most.device)
    head |= {"network": network, "left_out": [], "threads_per_rank": most.threads}
    pieces: list[dict[str, Any]] = []
    for number in options.ranks:
        fitting, left = sorted_out(job, options, number)
        head["left_out"] += left
        if not fitting.frames:
            continue
        where = replace(most, count=number)
        samples = generation.samples_for(job, quick=options.quick)
        pieces.append(generation.record(fitting, where, samples))
        results = generation.assemble(job, pieces, **head)
        say([each for each in results["records"] if each["ranks"] == number])
        save_unfinished(results, options.output_dir / f"{generation.name(results)}.json")
    return generation.assemble(job, pieces, **head)


def sorted_out(
    job: Job, options: argparse.Namespace, ranks: int
) -> tuple[Job, list[dict[str, Any]]]:
    """The job with the sizes that fit so many ranks, and what is left out."""
    fitting, left = [], []
    for words in options.tokens:
        frames = max(round(count(words, what="--tokens") / job.case.frame_tokens), 1)
        memory = Share.of(generation.scenario(job, frames), ranks).held(new_tokens=job.all_tokens)
        needed = (memory.peak - memory.weights) / 2**30
        if needed <= options.budget_gib / ranks:
            fitting.append(frames)
            continue
        why = f"{needed:.1f} GiB a rank, and --budget_gib is {options.budget_gib:g} for all"
        tokens = frames * job.case.frame_tokens
        left.append({"ranks": ranks, "visual_tokens": tokens, "why": why})
    return replace(job, frames=tuple(fitting)), left


def say(records: list[dict[str, Any]]) -> None:
    """Lines of progress."""
    for each in records:
        print(
            f"{each['visual_tokens']:,} visual tokens, {each['ranks']} ranks: "
            f"{each['tokens_per_s']:.2f} tokens a second ({each['predicted']['tokens_per_s']:.2f} "
            f"predicted), {each['kept_bytes'] / 2**20:,.0f} MiB",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    main()
