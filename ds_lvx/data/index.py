"""Where the records of a file stand: found by reading all of it, once a machine."""

from __future__ import annotations

import base64
import codecs
import hashlib
import json
import os
import re
import sys
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_lvx import cache

# Smaller files are read faster than a cache is worth.
SMALL_BYTES = 1 << 21
_PIECE_BYTES = 1 << 20
_COLUMNS = ("numbers", "offsets", "lengths", "sums")
# Of the cache's files; one written on a machine of another byte order is another format.
_FORMAT = f"1 {sys.byteorder}"
_SPACE = re.compile(r"[ \t\r\n]*")


def _column() -> array[int]:
    return array("q")


@dataclass
class Index:
    """The lines of a file that are not blank, or the elements of an array.

    Attributes:
        numbers: of the lines, from 1, counted with the blank ones; of an array, those on which its
            elements begin.
        offsets: bytes before each.
        lengths: bytes of each, with the end of a line.
        sums: CRC-32 of each.
        sha256: of all bytes of the file, hexadecimal.
    """

    numbers: array[int] = field(default_factory=_column)
    offsets: array[int] = field(default_factory=_column)
    lengths: array[int] = field(default_factory=_column)
    sums: array[int] = field(default_factory=_column)
    sha256: str = ""

    def add(self, number: int, offset: int, length: int, total: int) -> None:
        """The next line; one of no length is blank."""
        if length > 0:
            for column, value in zip(_COLUMNS, (number, offset, length, total), strict=True):
                getattr(self, column).append(value)


def kept_index(path: str, read: Callable[[str], Index]) -> Index:
    """What ``read`` finds, or what it found when this file was read before.

    Args:
        path: of the file.
        read: `scan`, or another that reads such files.

    The ranks of a machine wait for the first of them. The cache is in `ds_lvx.cache.folder`, a few
    bytes a line, one file for each path; a file of another size or time of change is read anew.

    Raises:
        OSError: the file cannot be read.
        ValueError: as ``read`` does.
    """
    state = Path(path).stat()
    if state.st_size < SMALL_BYTES:
        return read(path)
    place = str(Path(path).resolve())
    stamp = [place, state.st_size, state.st_mtime_ns, read.__name__, _FORMAT]
    name = f"lines/{hashlib.sha256(os.fsencode(place)).hexdigest()[:32]}.json"
    found = _index(cache.read(name), stamp)
    if found is None:  # only now the lock, behind which others may have written it
        found = _index(cache.update(name, lambda old: _renewed(old, path, stamp, read)), stamp)
    return read(path) if found is None else found


def scan(path: str) -> Index:
    """Read a file from end to end.

    Raises:
        OSError: it cannot be read.
    """
    index, digest = Index(), hashlib.sha256()
    number, offset, length, total, blank = 1, 0, 0, 0, True
    with open(path, "rb") as file:
        # In pieces: a file without an end of line must not be in memory whole.
        while piece := file.readline(_PIECE_BYTES):
            digest.update(piece)
            length, total = length + len(piece), zlib.crc32(piece, total)
            blank = blank and not piece.removeprefix(codecs.BOM_UTF8).strip()
            if piece.endswith(b"\n"):
                index.add(number, offset, 0 if blank else length, total)
                number, offset, length, total, blank = number + 1, offset + length, 0, 0, True
    index.add(number, offset, 0 if blank else length, total)
    index.sha256 = digest.hexdigest()
    return index


def scan_array(path: str) -> Index:
    """Read a file that is one JSON array.

    Takes three times the file's bytes of memory, once a machine.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no array from end to end; says from which line on.
    """
    data = Path(path).read_bytes()
    index = Index(sha256=hashlib.sha256(data).hexdigest())
    # A character for a byte: what gives JSON its structure is ASCII.
    text = data.decode("latin-1")
    number, counted = 1, 0
    for begin, end in _elements(text):
        number, counted = number + text.count("\n", counted, begin), begin
        index.add(number, begin, end - begin, zlib.crc32(data[begin:end]))
    return index


def _elements(text: str) -> Iterator[tuple[int, int]]:
    """Where the elements of an array begin and end."""
    decode = json.JSONDecoder(strict=False).raw_decode
    place = _after_space(text, text.index("[") + 1)
    more = text[place : place + 1] != "]"
    try:
        while more:
            begin, (_, end) = place, decode(text, place)
            yield begin, end
            place = _after_space(text, end)
            more = text[place : place + 1] == ","
            if more:
                place = _after_space(text, place + 1)
    except RecursionError:
        raise _array_error(text, place, "JSON that is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _array_error(text, error.pos, error.msg) from None
    if text[place : place + 1] != "]":
        raise _array_error(text, place, "neither a comma nor the array's end")
    if _after_space(text, place + 1) != len(text):
        raise _array_error(text, place, "text after the array's end")


def _array_error(text: str, place: int, what: str) -> ValueError:
    return ValueError(f"line {1 + text.count(chr(10), 0, place)}: {what}")


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return place if found is None else found.end()


def _renewed(
    record: dict[str, Any], path: str, stamp: list[Any], read: Callable[[str], Index]
) -> dict[str, Any]:
    return record if _index(record, stamp) is not None else _record(read(path), stamp)


def _record(index: Index, stamp: list[Any]) -> dict[str, Any]:
    lines = b"".join(getattr(index, column).tobytes() for column in _COLUMNS)
    packed = base64.b85encode(zlib.compress(lines, 1)).decode()
    return {"file": stamp, "sha256": index.sha256, "sum": zlib.crc32(lines), "lines": packed}


def _index(record: dict[str, Any], stamp: list[Any]) -> Index | None:
    """The index of a record; None of an empty or a damaged one, and of one of another file."""
    if record.get("file") != stamp:
        return None
    try:
        lines = zlib.decompress(base64.b85decode(record["lines"]))
        if zlib.crc32(lines) != record["sum"] or len(record["sha256"]) != 64:
            return None
        index, size = Index(sha256=record["sha256"]), len(lines) // len(_COLUMNS)
        for n, column in enumerate(_COLUMNS):
            getattr(index, column).frombytes(lines[n * size : (n + 1) * size])
        return index
    except (KeyError, TypeError, ValueError, zlib.error):
        return None
