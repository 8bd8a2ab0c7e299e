"""Time attention kernels side by side on the shapes of the paper's models and of MOSS-VL.

    python launch/bench_kernels.py                          one GPU, some minutes
    python launch/bench_kernels.py --device cpu --quick --output /tmp/kernels.json    to try it
    python launch/bench_kernels.py --compile                what the compiler makes of ours; no GPU
    python launch/bench_kernels.py --floors                 the least times by data sheets; no GPU

Each of our kernels, forward and backward, against every backend of PyTorch's attention, and
against flash-attn where it is installed. A candidate is checked against float64 before it is timed.
One that is wrong, raises, hangs or runs out of memory is in the JSON with its reason, and the rest
goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.kernels import candidates as kernel_candidates
from bench.kernels import report as kernels_report
from bench.kernels import subject as kernels
from bench.kernels.cases import MEASURED, QUICK
from bench.kernels.occupancy import BLOCK_SHARED_BYTES
from bench.kernels.trial import Timing
from ds_lvx.compare.document import save, save_unfinished, write_between
from ds_lvx.compare.harness import RunError
from ds_lvx.compare.machine import header

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("floors", "compiled", "measured")


def main() -> None:
    """Measure, compile or predict; then write JSON and tables."""
    options = parse_options()
    if options.compile:
        save(compile_all(), path_of("compiled", options))
    elif options.floors:
        records = kernels_report.floors(MEASURED)
        save({**header(predicted=True), "records": records}, path_of("floors", options))
    bad: list[str] = []
    if not (options.compile or options.floors or options.render):
        try:
            results = measure(options)
        except RunError as error:
            sys.exit(f"bench_kernels: {error}")
        save(results, options.output)
        if options.document is None:
            print(kernels_report.measured_table(results))
        # Without a GPU `triton` cannot run; that is no fault.
        bad = kernels.faults(results["records"]) if options.device == "cuda" else []
    if options.document is not None:
        render(options)
    if bad:
        sys.exit(f"bench_kernels: wrong or failed, see the JSON: {', '.join(bad)}")


def parse_options() -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--only",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="of CASE/CANDIDATE/DIRECTION, such as 'mllama-192*/triton/*'",
    )
    parser.add_argument("--repeats", type=int, help="samples of a time, at most (50; quick: 3)")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="that the samples of one time should take"
    )
    parser.add_argument(
        "--budget_s", type=float, default=3600.0, help="what has not begun then is left out"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "docs" / "benchmarks" / "kernels.json",
        help="JSON of the measurement; those of --compile and --floors are named after it",
    )
    parser.add_argument("--document", type=Path, help="Markdown file that gets the tables")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the script")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--render", action="store_true", help="nothing measured: from the JSON")
    mode.add_argument("--compile", action="store_true", help="compile for sm_80, sm_90, sm_100")
    mode.add_argument("--floors", action="store_true", help="predict the least times")
    options = parser.parse_args()
    if options.repeats is None:
        options.repeats = 3 if options.quick else 50
    for name in ("repeats", "seconds", "budget_s"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name}: got {getattr(options, name)}; expected more than 0")
    if options.render and options.document is None:
        parser.error("--render: got no --document; expected the Markdown file for the tables")
    measures = not (options.render or options.compile or options.floors)
    if measures and options.device == "cuda" and not cuda:
        parser.error(
            "--device: got cuda, but PyTorch sees no GPU; expected a machine with one, or "
            "--device cpu --quick to try the script"
        )
    try:
        options.trials = kernels.trials_of(
            QUICK if options.quick else MEASURED, kernel_candidates.names(), options.only
        )
    except ValueError as error:
        parser.error(str(error))
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All trials; what there is so far is written anew with every record."""
    timing = Timing(
        device=options.device,
        repeats=options.repeats,
        seconds=options.seconds,
        budget_s=options.budget_s,
        quick=options.quick,
    )
    results: dict[str, Any] = {
        **header(device=options.device),
        "dtype": "bf16",
        "records": [],
    }
    found = kernels.measure(options.trials, timing)
    results["rates"] = next(found)
    for record in found:
        results["records"].append(record)
        save_unfinished(results, options.output)
        spread = record.get("device_s")
        said = f"{1e3 * spread['median']:.4g} ms" if spread else record["reason"].partition("\n")[0]
        print(f"{record['name']}: {record['status']}, {said}", flush=True)
    return results


def compile_all() -> dict[str, Any]:
    """What the compiler makes of our kernels; a process for each capability, side by side."""
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"}  # as it is; warns when unset
    environment.pop("TRITON_INTERPRET", None)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.kernels.compiled", str(capability)],
            env=environment,
            cwd=ROOT / "launch",
            stdout=subprocess.PIPE,
            text=True,
        )
        for capability in BLOCK_SHARED_BYTES
    ]
    listings = [process.communicate()[0] for process in started]
    if any(process.returncode != 0 for process in started):
        sys.exit("bench_kernels: --compile: a compiler failed; its error stands above")
    records = [record for text in listings for record in json.loads(text.splitlines()[-1])]
    about = {"kind": "measured", "device": "none: compiled ahead of time"}
    return {**header(predicted=True), **about, "records": records}


def render(options: argparse.Namespace) -> None:
    """Write the tables of whatever JSON there is into the document.

    What was left out of the measurement for lack of time may be in a second one, ``-others.json``.
    """
    paths = {part: path_of(part, options) for part in PARTS}
    paths["others"] = options.output.with_name(f"{options.output.stem}-others.json")
    found = {part: json.loads(p.read_text()) if p.exists() else None for part, p in paths.items()}
    if found["others"] is not None:
        found["measured"] = kernels_report.joined(found["measured"], found["others"])
    tables = {"measured": kernels_report.measured_table(found["measured"])}
    if found["floors"] is not None:
        tables["floors"] = kernels_report.floors_table(found["floors"], found["measured"])
    if found["compiled"] is not None:
        tables["compiled"] = kernels_report.compiled_table(found["compiled"])
    for part, table in tables.items():
        write_between(options.document, f"bench_kernels.py, {part}", table)
        print(table, flush=True)


def path_of(part: str, options: argparse.Namespace) -> Path:
    """The JSON of a part."""
    output: Path = options.output
    return output if part == "measured" else output.with_name(f"{output.stem}-{part}.json")


if __name__ == "__main__":
    main()
