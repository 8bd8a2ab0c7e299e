"""Where a sample came from, and the one error that the data modules raise."""

from __future__ import annotations

import io
import reprlib
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Source:
    """A line of a JSONL file, or a record of another.

    Attributes:
        path: the file as the caller named it.
        line: counted from 1.
        place: what a record has in the place of a line.
    """

    path: str
    line: int
    place: str | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.place is None else f"{self.path}, {self.place}"


class DataError(ValueError):
    """What is wrong in the caller's data: where, what was found, what belongs there, what to do."""

    @classmethod
    def at(cls, source: Source | str, *, got: str, expected: str, do: str) -> DataError:
        """The error with its four parts in the usual order."""
        return cls(f"{source}: got {got}; expected {expected}; {do}")


def shown(value: Any) -> str:
    """A value as Python writes it, of a long or deep one as much as a message may hold."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def print_any_name() -> None:
    """Let standard output take names of files that are no UTF-8, as an archive may hold them."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
