"""What a comparison leaves: JSON, a plot, a table on the terminal and in a document."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from rich.console import Console
from rich.markdown import Markdown

Results = Mapping[str, Any]
"""What the JSON of a comparison holds."""


class Subject(Protocol):
    """What a subject has to say about its results."""

    # Of the files, and of the place in a document.
    def name(self, results: Results, /) -> str: ...

    # Tables and what belongs to them, in Markdown.
    def text(self, results: Results, /) -> str: ...

    # A figure of matplotlib's; None where there is none, ModuleNotFoundError without matplotlib.
    def draw(self, results: Results, /) -> Any: ...


def deliver(
    subject: Subject,
    results: Results,
    *,
    program: str,
    folder: Path | None = None,
    document: Path | None = None,
    as_json: bool = False,
) -> None:
    """Print the table or the JSON; write JSON and plot into a folder, the table into a document.

    In the document it is the place of ``program``, see `write_between`.
    """
    name, text = subject.name(results), subject.text(results)
    # First of all: it took long to measure, and a file may fail.
    if as_json:
        print(json.dumps(results, indent=1), flush=True)
    elif sys.stdout.isatty():
        Console().print(Markdown(text))
    else:
        print(text, flush=True)
    if folder is not None:
        path = save(results, folder / f"{name}.json")
        try:
            figure = subject.draw(results)
            if figure is not None:
                figure.savefig(path.with_suffix(".png"), dpi=110)
        except ModuleNotFoundError as error:
            print(f"no plot: {error}; pip install 'ds_lvx[plots]'", file=sys.stderr)
    if document is not None:
        write_between(document, f"{program}, {name}", text)


def save(results: Results, path: Path, *, indent: int | None = 1) -> Path:
    """Write a JSON, and its folder where there is none; without indent in one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=indent) + "\n")
    _unfinished(path).unlink(missing_ok=True)
    return path


def save_unfinished(results: Results, path: Path) -> None:
    """Write beside ``path`` what there is so far, of use even if the rest never comes.

    What stands at ``path`` from an earlier time stays whole until `save` replaces it.
    """
    save(results, _unfinished(path))


def _unfinished(path: Path) -> Path:
    return path.with_suffix(".unfinished.json")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


Cells: TypeAlias = Mapping[str, str | Callable[[Any], str]]
"""By heading, what makes a record's cell: a format of its names, or a function of it."""


def cell(made_by: str | Callable[[Any], str], record: Mapping[str, Any]) -> str:
    """One of a record's `Cells`."""
    return made_by.format_map(record) if isinstance(made_by, str) else made_by(record)


def columns(records: Sequence[Mapping[str, Any]], cells: Cells) -> str:
    """A table with a line a record."""
    rows = [[cell(made_by, record) for made_by in cells.values()] for record in records]
    return markdown([list(cells), *rows])


def times(ratio: float | None, digits: int = 2) -> str:
    """How many times faster, rounded down: never in anybody's favour."""
    return "-" if ratio is None else f"{math.floor(ratio * 10**digits) / 10**digits:.{digits}f}"


def percentiles(
    spread: Mapping[str, float], write: Callable[[float], str] = "{:.3f}".format
) -> str:
    """``0.207 (0.182 to 0.223)``."""
    return "{} ({} to {})".format(*(write(spread[name]) for name in ("median", "p10", "p90")))


def write_between(document: Path, mark: str, text: str) -> None:
    """Replace what stands in Markdown between ``<!-- MARK: begin -->`` and ``<!-- MARK: end -->``.

    A mark is such as ``bench_kernels.py, measured``.

    Raises:
        ValueError: the document does not have both lines, in order.
    """
    begin, end = (f"<!-- {mark}: {edge} -->" for edge in ("begin", "end"))
    head, found_begin, rest = document.read_text().partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(
            f"{document}: got no {begin!r} followed by {end!r}; expected both, as lines of their "
            "own, where the text goes"
        )
    document.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}")
