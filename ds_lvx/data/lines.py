"""A JSONL file, or a JSON array, as an index: read once a machine, then each line when asked for.

A hundred thousand lines cost a few megabytes of offsets, whatever stands in them. A line is parsed
as strict JSON: a key that occurs twice is an error, not a choice.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ds_lvx.data.errors import DataError, Source, shown
from ds_lvx.data.index import kept_index, scan, scan_array
from ds_lvx.data.limits import DEFAULT_LIMITS, Limits

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Lines:
    """The lines of a file that are not blank, or the elements of the one array that it is.

    Args:
        path: of the file. A byte-order mark before a line is skipped.
        limits: of these ``max_line_bytes``.

    Attributes:
        path: of the file, as given.
        sha256: of its bytes, hexadecimal.

    Raises:
        DataError: no such file, nothing in it, UTF-16, or an array that breaks off; lines
            themselves are looked at when they are asked for.
    """

    def __init__(self, path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS) -> None:
        self.path = os.fspath(path)
        self._max_bytes = limits.max_line_bytes
        if not Path(self.path).is_file():
            found = "a folder" if Path(self.path).is_dir() else "no such file"
            raise self._error(found, "a file of chats", "check the path")
        try:
            with open(self.path, "rb") as file:
                self._is_array = _is_array(file, self.path)
            self._index = kept_index(self.path, scan_array if self._is_array else scan)
        except OSError as error:
            raise self._error(f"a file that cannot be read ({error.strerror})") from None
        except DataError:
            raise
        except ValueError as error:
            raise self._error(
                f"a JSON array that cannot be read on from {error}",
                "[{...}, {...}]",
                "correct the file there",
            ) from None
        self.sha256 = self._index.sha256
        if not self._index.numbers:
            raise self._error("an empty file", "at least one line of JSON", "add samples to it")

    def __len__(self) -> int:
        return len(self._index.numbers)

    def source(self, index: int) -> Source:
        """Where a line stands, its number counted with the blank ones; of an array the element,
        counted from 0."""
        line = self._index.numbers[index]
        return Source(self.path, line, f"line {line}, element {index}" if self._is_array else None)

    def raw(self, index: int) -> bytes:
        """The bytes of a line.

        Raises:
            DataError: it is longer than ``max_line_bytes``, or not what it was when it was indexed.
        """
        source, length = self.source(index), self._index.lengths[index]
        if length > self._max_bytes:
            raise DataError.at(
                source,
                got=f"a line of {length:,} bytes",
                expected=f"at most {self._max_bytes:,}",
                do="correct the line, split the chat, or raise --max_line_bytes",
            )
        try:
            with open(self.path, "rb") as file:
                file.seek(self._index.offsets[index])
                raw = file.read(length)
        except OSError as error:
            raise self._error(f"a file that cannot be read ({error.strerror})") from None
        if zlib.crc32(raw) != self._index.sums[index]:
            raise DataError.at(
                source,
                got="a line that was changed while the file was in use",
                expected="what stood there at the start",
                do="leave the file alone and start again",
            )
        return raw.removeprefix(codecs.BOM_UTF8)

    def record(self, index: int) -> dict[str, Any]:
        """A line as the JSON object that it is.

        Raises:
            DataError: it is none; see also `raw`.
        """
        return parsed(self.raw(index), self.source(index))

    @property
    def folder(self) -> str:
        """Of the file."""
        return str(Path(self.path).parent)

    def blocks(self, kept: Sequence[int]) -> tuple[int, ...]:
        """All in one file."""
        return (len(kept),)

    def _error(
        self,
        got: str,
        expected: str = "a JSONL file in UTF-8",
        do: str = "check the file and its rights",
    ) -> DataError:
        return DataError.at(self.path, got=got, expected=expected, do=do)


def _is_array(file: BinaryIO, path: str) -> bool:
    start = file.read(4096)
    if start.startswith(_UTF16):
        raise DataError.at(
            path,
            got="a file in UTF-16",
            expected="a JSONL file in UTF-8",
            do=f"rewrite it: iconv -f UTF-16 -t UTF-8 {path} > FILE",
        )
    start = start.removeprefix(codecs.BOM_UTF8).lstrip()
    return re.match(rb"\[\s*(\{|\]|$)", start) is not None


def parsed(raw: bytes, source: Source) -> dict[str, Any]:
    """Bytes as the JSON object that they are.

    Raises:
        DataError: they are none.
    """
    try:
        record = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        problem = "JSON that is nested too deeply"
    except ValueError as error:
        start = shown(raw[:200].decode("utf-8", "replace").strip())
        hint = ", NUL bytes as of UTF-16" if b"\0" in raw else ""
        problem = f"{start} ({error}{hint})"
    else:
        if isinstance(record, dict):
            return record
        problem = f"{type(record).__name__} {shown(record)}"
    raise DataError.at(
        source,
        got=problem,
        expected="one JSON object",
        do="correct the line (`jq -c . FILE` puts every object on a line of its own)",
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(twice)} occurs twice")
    return built
