"""Whether a film is all there: containers say at their beginning how many bytes follow.

Half of an MP4 or of a Matroska file plays to where it ends; that the rest is missing shows in the
sizes of the outermost parts alone.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

# Outermost boxes of ISO files. Others end the walk: bytes behind the last box are no box.
_BOXES = frozenset(
    b"ftyp styp moov mdat moof free skip wide sidx uuid mfra meta udta pnot ssix prft emsg".split()
)
_MATROSKA = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"
# Writers of AVI disagree on whether the padding at the end counts.
_PADDING_BYTES = 8


def check_whole(path: str) -> None:
    """Refuse a film of which the end is missing.

    Args:
        path: of a file; one in a container that does not tell its size passes.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has fewer bytes than it says.
    """
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        told = told_bytes(file, size)
    if told > size + _PADDING_BYTES:
        raise ValueError(
            f"got the first {size:,} bytes of a file that says it has at least {told:,}: it was "
            "cut off and cannot be decoded to its end; expected a whole file; download it again"
        )


def told_bytes(file: BinaryIO, size: int) -> int:
    """Bytes that a file should have by what it says itself; 0 where it says nothing.

    Args:
        file: at its beginning.
        size: bytes that it has.
    """
    head = file.read(12)
    if head[4:8] in _BOXES:
        return _iso(file, size)
    if head[:4] == _MATROSKA:
        return _matroska(file)
    if head[:4] == b"RIFF" and head[8:] == b"AVI ":
        return _riff(file, size)
    return 0


def _iso(file: BinaryIO, size: int) -> int:
    place = 0
    while place < size:
        file.seek(place)
        head = file.read(16)
        if len(head) < 8 or head[4:8] not in _BOXES:
            break
        length = int.from_bytes(head[:4], "big")
        if length == 1:  # a 64-bit size follows
            length = int.from_bytes(head[8:16], "big")
        if length < 8:  # 0: up to the end, wherever that is
            break
        place += length
    return place


def _matroska(file: BinaryIO) -> int:
    file.seek(len(_MATROSKA))
    length = _ebml_number(file)
    if length is None:
        return 0
    file.seek(length, 1)
    if file.read(len(_SEGMENT)) != _SEGMENT:
        return 0
    length = _ebml_number(file)
    return 0 if length is None else file.tell() + length


def _ebml_number(file: BinaryIO) -> int | None:
    """A number whose leading zero bits tell its bytes; None: all ones, which means "unknown"."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    extra = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0x7F >> extra)]) + file.read(extra), "big")
    return None if value == (1 << 7 * (extra + 1)) - 1 else value


def _riff(file: BinaryIO, size: int) -> int:
    place = 0
    while place < size:  # a large AVI is a row of RIFF lists
        file.seek(place)
        head = file.read(8)
        if len(head) < 8 or head[:4] != b"RIFF":
            break
        length = struct.unpack("<I", head[4:])[0]
        if length == 0:  # its writer never came back to fill it in
            break
        place += 8 + length + length % 2
    return place
