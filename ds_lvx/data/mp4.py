"""When the samples of an MP4 track are shown, from its header alone.

FFmpeg tells the decoding times of all samples without reading them (``stream.index_entries``), and
how far behind these a sample is shown only with the sample itself. That is what ``ctts`` lists.
Source: ISO/IEC 14496-12, 8.6.1.3.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# Of a header; two days of 60 frames a second have less.
_MAX_BYTES = 1 << 28


def shown_later(path: str, track: int, samples: int) -> array[int] | None:
    """By how much every sample of a track is shown later than it is decoded.

    Args:
        path: of an MP4 or QuickTime file.
        track: its number in the file.
        samples: that the track has.

    Returns:
        In units of the track's time base, in decoding order; None where the header does not list
        them all: a film in fragments, another container, a damaged header.
    """
    with Path(path).open("rb") as file:
        moov = _moov(file, Path(path).stat().st_size)
    if moov is None or any(kind == b"mvex" for kind, _ in _boxes(moov)):
        return None
    table = _table(moov, track)
    if table is None:
        return array("q", bytes(8 * samples))
    return _expanded(table, samples)


def _moov(file: BinaryIO, size: int) -> memoryview | None:
    place = 0
    while place + 8 <= size:
        file.seek(place)
        head = file.read(16)
        length, start = int.from_bytes(head[:4], "big"), 8
        if length == 1:
            length, start = int.from_bytes(head[8:16], "big"), 16
        if head[4:8] == b"moov" and start <= length <= _MAX_BYTES:
            file.seek(place + start)
            return memoryview(file.read(length - start))
        if length < start:
            return None
        place += length
    return None


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    place = 0
    while place + 8 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        if length < 8:  # none inside of a header is that large, or lasts to the end
            return
        yield bytes(data[place + 4 : place + 8]), data[place + 8 : place + length]
        place += length


def _inside(data: memoryview, *path: bytes) -> memoryview | None:
    for name in path:
        found = next((body for kind, body in _boxes(data) if kind == name), None)
        if found is None:
            return None
        data = found
    return data


def _table(moov: memoryview, track: int) -> memoryview | None:
    for kind, body in _boxes(moov):
        header = _inside(body, b"tkhd") if kind == b"trak" else None
        if header is None or len(header) < 24:
            continue
        place = 20 if header[0] == 1 else 12  # times of 64 or of 32 bits stand before the number
        if int.from_bytes(header[place : place + 4], "big") == track:
            return _inside(body, b"mdia", b"minf", b"stbl", b"ctts")
    return None


def _expanded(table: memoryview, samples: int) -> array[int] | None:
    later = array("q")
    rows = int.from_bytes(table[4:8], "big")
    if len(table) < 8 + 8 * rows:
        return None
    for place in range(8, 8 + 8 * rows, 8):
        count = int.from_bytes(table[place : place + 4], "big")
        offset = int.from_bytes(table[place + 4 : place + 8], "big", signed=True)
        if len(later) + count > samples:
            return None
        later.extend([offset] * count)
    if len(later) != samples:
        return None
    return later
