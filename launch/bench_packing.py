"""Measure samples a second of training on a mixed data set, packed against padded.

    python launch/bench_packing.py --document docs/fine-tuning.md
    python launch/bench_packing.py --quick --output_dir /tmp/packing         small, to try it
    python launch/bench_packing.py --render --document docs/fine-tuning.md   only from the JSON

Writes packing.json into --output_dir, and a table into --document. On the CPU, two ranks.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench import packing
from ds_lvx.compare.document import deliver
from ds_lvx.compare.fresh import RunError
from ds_lvx.compare.harness import Ranks
from ds_lvx.compare.machine import header

ROOT = Path(__file__).resolve().parent.parent
QUICK = packing.Task(samples=4, per_step=2, text_tokens=(30, 120), frames=(1, 4), epochs=1)


def main() -> None:
    """Measure, then write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--output_dir", type=Path, default=ROOT / "docs" / "benchmarks")
    add("--document", type=Path, help="Markdown file that gets the table")
    add("--ranks", type=int, default=2)
    add("--quick", action="store_true", help="a small set, to try the script")
    add("--render", action="store_true", help="nothing measured: from the JSON")
    options = parser.parse_args()
    task = QUICK if options.quick else packing.Task()
    try:
        if options.render:
            results = json.loads((options.output_dir / "packing.json").read_text())
        else:
            head = {**header(device="cpu"), "ranks": options.ranks}
            results = packing.assemble(
                task, packing.measure(task, Ranks(options.ranks, timeout_s=900)), **head
            )
    except (RunError, OSError) as error:
        sys.exit(f"bench_packing: {error}")
    deliver(
        packing,
        results,
        program="bench_packing.py",
        folder=None if options.render else options.output_dir,
        document=options.document,
    )


if __name__ == "__main__":
    main()
