"""Measure what visual tokens cost in memory, by setting, and what recomputation costs in time.

    python launch/bench_memory.py                     all settings; most of an hour on two cores
    python launch/bench_memory.py --quick --output_dir /tmp/memory    tiny shapes, seconds

Trains the real path: a Llama-3.2-Vision model whose cross-attention has its real dimensions, under
`ds_lvx.initialize`, in fresh processes for each setting and size. Writes memory.json, memory.png
and step_time.json into --output_dir, and tables into --document. Where there are GPUs, each rank
takes one.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import torch

from bench import memory
from bench.peak import meter
from bench.script import leave, measured, told, usual_parser
from ds_lvx.compare.case import Case
from ds_lvx.compare.document import save_unfinished
from ds_lvx.compare.machine import cores, header
from ds_lvx.plan.memory import Setting

PARTS = ("memory", "step_time")
FEATURES = ("trained", "frozen")
EIGHTH = Case(
    cross_layers=1,
    self_layers=4,
    mlp=14336,
    vision_hidden=1280,
    vision_heads=16,
    vision_mlp=5120,
    vision_layers=4,
    vision_global_layers=1,
    image_size=560,
    patch_size=14,
    tiles=4,
    trains="cross",
)
"""An eighth of the published model, but for its vocabulary."""
TINY: dict[str, Any] = {
    "hidden": 64,
    "heads": 4,
    "kv_heads": 2,
    "cross_layers": 2,
    "text_tokens": 8,
}


def main() -> None:
    """Measure, then write JSON, plot and tables."""
    options = parse_options()
    measurements = {"memory": measure_memory, "step_time": measure_time}
    for part in options.parts:
        with told("bench_memory"):
            results = measured(part, options, lambda part=part: measurements[part](options))
            # The formulas as they are now, beside what was measured.
            for record in results["records"] if part == "memory" else ():
                cuda = results["device"] == "cuda"
                record |= memory.compared(record, ranks=results["ranks"], cuda=cuda)
            leave("bench_memory", memory, results, options)


def parse_options() -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = usual_parser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="SETTING", help="some of the settings")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=FEATURES)
    parser.add_argument("--ranks", type=int, default=min(torch.cuda.device_count(), 2) or 2)
    parser.add_argument("--frames", type=int, default=1024 if cuda else 32, help="of 65 tokens")
    # Sizes are multiples of it, so that chunks, which are of one length, have the same everywhere.
    parser.add_argument("--chunk_tokens", type=int, default=65 * (128 if cuda else 16))
    parser.add_argument("--steps", type=int, default=3, help="measured for a step time")
    parser.add_argument("--rounds", type=int, default=2, help="of the step times' processes")
    parser.add_argument(
        "--budget_gib",
        type=float,
        default=16.0 if cuda else 1.0,
        help="memory of a rank that the largest runs may fill; 0 leaves them out",
    )
    for flag, what in {
        "brief": "of the step times only the first comparison",
        "enlarge": "add to each setting of memory.json one run, as large as --budget_gib allows",
    }.items():
        parser.add_argument(f"--{flag}", action="store_true", help=what)
    options = parser.parse_args()
    for name in ("frames", "chunk_tokens", "steps", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: got {getattr(options, name)}; expected at least 1")
    if options.budget_gib < 0:
        parser.error(f"--budget_gib: got {options.budget_gib}; expected 0 or more")
    try:
        options.where = memory.ranks_here(options.ranks)
    except ValueError as error:
        parser.error(str(error))
    known = memory.settings(options.chunk_tokens)
    for name in options.only or ():
        if name not in known:
            parser.error(f"--only: got {name!r}; expected some of: {'; '.join(known)}")
    for part in options.parts if options.render else ["memory"] * options.enlarge:
        if not (options.output_dir / f"{part}.json").exists():
            word = "--render" if options.render else "--enlarge"
            parser.error(f"{word}: got no {part}.json in {options.output_dir}")
    return options


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """All settings with features that want a gradient, and some with frozen features."""
    scales = memory.Scales(
        case=Case(**TINY) if options.quick else Case(),
        where=options.where,
        frames=options.frames,
        steps=options.steps,
        budget_bytes=int(options.budget_gib * memory.GIB),
    )
    results = {
        **header(),
        "ranks": options.ranks,
        "threads_per_rank": options.where.threads,
        "memory_measured_by": meter().source,
        "units": "bytes and tokens of one rank, the one that needs most; bytes above what was "
        "there before the step; seconds of the slowest rank",
        "case": asdict(scales.case),
        "records": [],
    }
    records, command = results["records"], results["command"]
    if options.enlarge:
        records += earlier(options, scales.case)
    settings = memory.settings(options.chunk_tokens).items()
    for features, (name, setting) in product(options.features, settings):
        if not _wanted(name, setting, features, options):
            continue
        own = replace(scales, case=replace(scales.case, features=features))
        if options.enlarge:
            for record in records:
                if (record["name"], record["features"]) == (name, features):
                    record |= memory.enlarge(record, own, command=command)
        else:
            own = replace(own, budget_bytes=own.budget_bytes if features == "trained" else 0)
            # Records of several commands may stand side by side.
            records.append({**memory.measure(name, setting, own), "command": command})
        save_unfinished(results, options.output_dir / "memory.json")
    return results


def earlier(options: argparse.Namespace, case: Case) -> list[dict[str, Any]]:
    """The records that memory.json has already, if they are of the same kind."""
    results = json.loads((options.output_dir / "memory.json").read_text())
    if ({"family": "", **results["case"]}, results["ranks"]) != (asdict(case), options.ranks):
        sys.exit(
            f"bench_memory: --enlarge: got a memory.json of another model or of {results['ranks']} "
            "ranks; expected the same ones: measure anew, or into another --output_dir"
        )
    records: list[dict[str, Any]] = results["records"]
    return records


def _wanted(name: str, setting: Setting, features: str, options: argparse.Namespace) -> bool:
    if features == "frozen" and name not in memory.ALSO_FROZEN:
        return False
    if options.only:
        return name in options.only
    # On a CPU the host's memory is the device's: there is nowhere to offload to.
    return torch.cuda.is_available() or setting.features == "keep"


def measure_time(options: argparse.Namespace) -> dict[str, Any]:
    """Step times with and without recomputation, of an eighth of a real model, in one process."""
    case = EIGHTH
    if options.quick:
        case = replace(case, **TINY, mlp=64, vision_hidden=32, vision_heads=2, vision_mlp=32)
        case = replace(case, cross_layers=1, vision_layers=1, image_size=28)
    scales = memory.Scales(case, memory.ranks_here(1), frames=1, steps=options.steps)
    results = {**header(), "threads": cores(), "case": asdict(case), "records": []}
    pairs = list(product((False, True), ("frozen", "tower")))
    for checkpointing, features in pairs[:1] if options.quick or options.brief else pairs:
        own = replace(scales, case=replace(case, features=features))
        record = memory.recomputation(own, checkpointing=checkpointing, rounds=options.rounds)
        results["records"].append(record)
        costs = record["recomputation_costs"]
        print(
            f"vision tower {record['vision_tower']}, checkpointing {checkpointing}: "
            f"{costs['step_s']:+.1%} of a step, {costs['processor_s']:+.1%} of processor time",
            flush=True,
        )
        save_unfinished(results, options.output_dir / "step_time.json")
    return results


if __name__ == "__main__":
    main()
