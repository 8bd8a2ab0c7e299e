"""What the scripts that measure have in common: usual options, what they read and leave."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_lvx.compare.command import ending_in_order
from ds_lvx.compare.document import Subject, deliver
from ds_lvx.compare.harness import RunError
from ds_lvx.compare.network import NetworkError

LAUNCH = Path(__file__).resolve().parent.parent
BENCHMARKS = LAUNCH.parent / "docs" / "benchmarks"


def usual_parser(doc: str | None) -> argparse.ArgumentParser:
    """The options where results go, ``--quick`` and ``--render``; ``doc`` is the script's."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    add = parser.add_argument
    add("--output_dir", type=Path, default=BENCHMARKS)
    add("--document", type=Path, help="Markdown file that gets the tables")
    add("--quick", action="store_true", help="tiny shapes, to try the script")
    add("--render", action="store_true", help="nothing measured: from the JSON")
    return parser


def measured(name: str, options: argparse.Namespace, measure: Callable[[], Any]) -> dict[str, Any]:
    """What ``measure`` returns, or with ``--render`` the JSON of this name."""
    if not options.render:
        return measure()
    results: dict[str, Any] = json.loads((options.output_dir / f"{name}.json").read_text())
    return results


def leave(
    program: str, subject: Subject, results: dict[str, Any], options: argparse.Namespace
) -> None:
    """Write JSON, plot and tables of a script, and print these."""
    places = {"folder": options.output_dir, "document": options.document}
    deliver(subject, results, program=f"{program}.py", **places)


@contextmanager
def told(program: str) -> Iterator[None]:
    """What goes wrong with ranks, networks, options and files ends the script with one line."""
    try:
        with ending_in_order():
            yield
    except (RunError, NetworkError, ValueError, OSError) as error:
        sys.exit(f"{program}: {error}")
    except KeyboardInterrupt:
        print(f"{program}: interrupted; ranks and network are gone", file=sys.stderr)
        sys.exit(130)
