"""Tables in Markdown, and their place in a document: between two comment lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def write_between(document: Path, mark: str, text: str) -> None:
    """Replace what stands between the two comment lines of ``document`` for ``mark``.

    Args:
        document: Markdown.
        mark: such as ``bench_kernels.py, measured``; the lines are ``<!-- MARK: begin -->`` and
            ``<!-- MARK: end -->``.
        text: without blank lines around it.

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
