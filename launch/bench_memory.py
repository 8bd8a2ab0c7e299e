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
from pathlib import Path
from typing import Any

import torch

from ds_lvx.compare.case import Case
from ds_lvx.compare.fresh import RunError
from ds_lvx.compare.machine import cores, header
from ds_lvx.compare.memory import measure as memory
from ds_lvx.compare.memory import report as memory_report
from ds_lvx.compare.memory import step_time
from ds_lvx.compare.memory.peak import meter
from ds_lvx.plan.memory import Setting

ROOT = Path(__file__).resolve().parent.parent
FEATURES = ("trained", "frozen")
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
        path = options.output_dir / f"{part}.json"
        if options.render:
            results = json.loads(path.read_text())
        else:
            try:
                results = measurements[part](options)
            except RunError as error:
                sys.exit(f"bench_memory: {error}")
        write(part, results, options)


def write(part: str, results: dict[str, Any], options: argparse.Namespace) -> None:
    """The JSON, for memory the plot, and the table, also into the document."""
    if part == "memory":
        for record in results["records"]:
            # The formulas as they are now, beside what was measured.
            ranks, cuda = results["ranks"], results["device"] == "cuda"
            record |= memory.compared(record, ranks=ranks, cuda=cuda)
    save(part, results, options)
    if part == "memory":
        memory_report.draw(results).savefig(options.output_dir / "memory.png", dpi=110)
    if options.document is not None:
        memory_report.write_into(options.document, part, results)
    print(memory_report.table(part, results), flush=True)


def save(part: str, results: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the JSON."""
    options.output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1) + "\n"
    (options.output_dir / f"{part}.json").write_text(text)


def parse_options() -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--document", type=Path, help="Markdown file that gets the tables")
    parser.add_argument("--only", nargs="+", metavar="SETTING", help="some of the settings")
    parser.add_argument(
        "--parts", nargs="+", choices=memory_report.NAMES, default=memory_report.NAMES
    )
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
    parser.add_argument(
        "--brief", action="store_true", help="of the step times only the first comparison"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--render", action="store_true", help="nothing measured: from the JSON")
    parser.add_argument(
        "--resume", action="store_true", help="measure only settings that memory.json lacks"
    )
    parser.add_argument(
        "--retime", action="store_true", help="measure only the step times of memory.json again"
    )
    parser.add_argument(
        "--enlarge",
        action="store_true",
        help="add to each setting of memory.json one run, as large as --budget_gib allows",
    )
    options = parser.parse_args()
    for name in ("ranks", "frames", "chunk_tokens", "steps", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: got {getattr(options, name)}; expected at least 1")
    if options.budget_gib < 0:
        parser.error(f"--budget_gib: got {options.budget_gib}; expected 0 or more")
    if cuda and options.ranks > torch.cuda.device_count():
        parser.error(
            f"--ranks: got {options.ranks} for {torch.cuda.device_count()} GPUs; expected a GPU "
            "for each rank"
        )
    known = memory.settings(options.chunk_tokens)
    for name in options.only or ():
        if name not in known:
            parser.error(f"--only: got {name!r}; expected some of: {'; '.join(known)}")
    later = options.resume or options.retime or options.enlarge
    for part in options.parts if options.render else ["memory"] * later:
        if not (options.output_dir / f"{part}.json").exists():
            word = "--render" if options.render else "--resume, --retime, --enlarge"
            parser.error(f"{word}: got no {part}.json in {options.output_dir}")
    return options


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """All settings with features that want a gradient, and some with frozen features."""
    case = Case(**TINY) if options.quick else Case()
    threads = max(cores() // options.ranks, 1)
    plan = memory.Plan(
        case=case,
        ranks=options.ranks,
        frames=options.frames,
        steps=options.steps,
        budget_bytes=int(options.budget_gib * memory.GIB),
        threads=threads,
    )
    results = {
        **header(),
        "ranks": options.ranks,
        "threads_per_rank": threads,
        "memory_measured_by": meter().source,
        "units": "bytes and tokens of one rank, the one that needs most; bytes above what was "
        "there before the step; seconds of the slowest rank",
        "case": asdict(case),
        "records": [],
    }
    if options.resume or options.retime or options.enlarge:
        results["records"] = earlier(options, case)
    records = results["records"]
    if options.retime:
        return retimed(results, plan)
    if options.enlarge:
        return enlarged(results, plan, options)
    done = {(record["name"], record["features"]) for record in records}
    wanted = [
        (name, setting, features)
        for features in options.features
        for name, setting in memory.settings(options.chunk_tokens).items()
        if _wanted(name, setting, features, options) and (name, features) not in done
    ]
    # Times first, all of them: they are what neighbours on the machine would disturb.
    times = [memory.time_steps(setting, plan, features=f) for _, setting, f in wanted]
    print("all settings are timed; the rest measures bytes", flush=True)
    for (name, setting, features), timed in zip(wanted, times, strict=True):
        budget = plan.budget_bytes if features == "trained" else 0
        own = replace(plan, budget_bytes=budget)
        record = memory.measure(name, setting, own, features=features, timed=timed)
        # Records of several commands may stand side by side.
        records.append({**record, "command": results["command"]})
        save("memory", results, options)  # of use even if the rest is never measured
    return results


def retimed(results: dict[str, Any], plan: memory.Plan) -> dict[str, Any]:
    """Earlier results with new step times; bytes stay as they were measured."""
    for record in results["records"]:
        setting = Setting(**record["setting"])
        timed = memory.time_steps(setting, plan, features=record["features"])
        record["timed"] = {**timed, "command": results["command"]}
        print(f"{record['name']}, features {record['features']}: {timed['step_s']}", flush=True)
    return results


def enlarged(
    results: dict[str, Any], plan: memory.Plan, options: argparse.Namespace
) -> dict[str, Any]:
    """Earlier results with one larger run each; nothing is timed."""
    for index, record in enumerate(results["records"]):
        name, features = record["name"], record["features"]
        if features not in options.features or (options.only and name not in options.only):
            continue
        larger = memory.enlarge(record, plan, command=results["command"])
        results["records"][index] = larger
        run = larger["runs"][-1]
        print(f"{name}, features {features}: {run['tokens']:,} tokens", flush=True)
        print(f"  {run['peak_bytes'] / memory.GIB:.3f} GiB, {run['step_s'][-1]:.1f} s", flush=True)
        save("memory", results, options)  # of use even if the rest is never measured
    return results


def earlier(options: argparse.Namespace, case: Case) -> list[dict[str, Any]]:
    """The records that memory.json has already, if they are of the same kind."""
    results: dict[str, Any] = json.loads((options.output_dir / "memory.json").read_text())
    if (results["case"], results["ranks"]) != (asdict(case), options.ranks):
        sys.exit(
            "bench_memory: --resume, --retime, --enlarge: got a memory.json of another model or "
            f"of {results['ranks']} ranks; expected the same ones: measure anew, or into another "
            "--output_dir"
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
    """Step times with and without recomputation."""
    case = step_time.EIGHTH
    if options.quick:
        case = replace(case, **TINY, mlp=64, vision_hidden=32, vision_heads=2, vision_mlp=32)
        case = replace(case, cross_layers=1, vision_layers=1, image_size=28)
    results: dict[str, Any] = {
        **header(),
        "threads": cores(),
        "case": asdict(case),
        "records": [],
    }
    first_alone = options.quick or options.brief
    for checkpointing in (False,) if first_alone else (False, True):
        for features in ("frozen",) if first_alone else ("frozen", "tower"):
            record = step_time.measure(
                replace(case, features=features),
                checkpointing=checkpointing,
                frames=1,
                steps=options.steps,
                rounds=options.rounds,
                threads=cores(),
            )
            results["records"].append(record)
            save("step_time", results, options)
    return results


if __name__ == "__main__":
    main()
