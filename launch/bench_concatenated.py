"""Measure models whose visual tokens stand among the text's against gathered embeddings.

    sudo -E env "PATH=$PATH" python launch/bench_concatenated.py --document docs/concatenated.md
    python launch/bench_concatenated.py --quick --network none --output_dir /tmp/concatenated

Two models with random weights, four ranks, an emulated network of 200 Mbit/s (root); some seven
minutes on two cores that do nothing else. Writes concatenated.json and .png into --output_dir.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import among
from ds_lvx.compare.case import Case, random_case, random_models
from ds_lvx.compare.command import ending_in_order
from ds_lvx.compare.document import deliver
from ds_lvx.compare.fresh import RunError
from ds_lvx.compare.harness import Ranks
from ds_lvx.compare.network import Network, NetworkError
from ds_lvx.compare.training.rank import Task
from ds_lvx.models.concatenated.family import Concatenated

ROOT = Path(__file__).resolve().parent.parent


def model() -> str:
    """The first family whose visual tokens stand among the text's."""
    names = random_models()
    return next(n for n in names if isinstance(random_case(n).contract(), Concatenated))


def case_of(hidden: int, heads: int, kv_heads: int, layers: int, **more: Any) -> Case:
    """A model of a size, with a small tower."""
    sizes = {"hidden": hidden, "heads": heads, "kv_heads": kv_heads, "cross_layers": layers}
    tower = {"vision_hidden": 256, "vision_heads": 4, "vision_mlp": 512, "vision_layers": 2}
    own = {"head_dim": 64, "mlp": 8 * hidden // 3, "vocabulary": 512, "text_tokens": 256}
    return replace(random_case(model()), **{**sizes, **tower, **own, **more})


def plan_of(options: argparse.Namespace) -> among.Plan:
    """What is measured."""
    tiny = case_of(256, 4, 2, 2)
    # With the gradients of all weights these links would carry little else.
    middle = case_of(768, 12, 4, 4, trains="kv", features="trained")
    # In 16 bits a CPU takes half a minute for the gradient of the tower's convolution.
    how: Any = {"dtype": "float32", "recompute": False}
    if options.quick:
        tiny = case_of(256, 4, 2, 1, text_tokens=32, vision_hidden=32, vision_layers=1)
        task = Task(model(), tiny, frames=4, warmup=0, repeats=1, **how)
        return among.Plan({"tiny": task}, replace(tiny, features="trained"), (1, 2))
    tasks = {
        "tiny": Task(model(), tiny, frames=8, warmup=1, repeats=3, **how),
        "mid-sized": Task(model(), middle, frames=8, warmup=0, repeats=2, **how),
    }
    return among.Plan(tasks, replace(middle, cross_layers=2), (1, 2, 4))


def main() -> int:
    """Measure, or read the JSON, and write JSON, plot and tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--document", type=Path, help="Markdown file that gets the tables")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--network", default="200mbit", help="RATE[,LATENCY], or none")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--render", action="store_true", help="nothing measured: from the JSON")
    options = parser.parse_args()
    try:
        with ending_in_order():
            if options.render:
                results = json.loads((options.output_dir / "concatenated.json").read_text())
            else:
                network = None if options.network == "none" else Network.parse(options.network)
                results = among.measure(plan_of(options), Ranks(options.ranks, network=network))
            deliver(
                among,
                results,
                program="bench_concatenated.py",
                folder=options.output_dir,
                document=options.document,
            )
    except (RunError, NetworkError, ValueError, OSError) as error:
        print(f"bench_concatenated: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench_concatenated: interrupted; ranks and network are gone", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
