"""Samples of webdataset shards: tar files, read where they lie.

Files of one name belong together, as in webdataset: ``000012.json`` (or ``.txt``), ``000012.jpg``,
``000012.1.jpg``. What lies where is found once a machine by walking the headers; a sample is then
read by itself, so that a run takes shards in a random order, samples in a random order within each,
replicas samples of their own, and a run that resumes goes on at its place.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from ds_lvx.data.conversation import Own
from ds_lvx.data.errors import DataError, Source, shown
from ds_lvx.data.held import Held
from ds_lvx.data.index import Index, kept_index
from ds_lvx.data.lines import parsed

_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
"""Name and endings of a file, as webdataset's ``base_plus_ext`` has them."""
_KINDS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif"), "image"),
    **dict.fromkeys(("mp4", "mkv", "webm", "mov", "avi", "m4v", "mpg", "mpeg", "ts"), "video"),
}
_MEDIA = ("image", "video")
_SINGLE = (*_MEDIA, "images", "videos")
_NAMED = (*_SINGLE, "image_url", "video_url", "url", "path", "file")
"""Keys of a record under which the name of a file may stand."""


@dataclass(frozen=True)
class _Member:
    """A file of a sample: its name in the tar, the endings of that, and where its bytes are."""

    name: str
    ending: str
    offset: int
    size: int


class Shards:
    """The samples of tar files.

    Args:
        path: as given.
        files: the shards, in their order.

    Attributes:
        path: as given.
        sha256: of the headers of all shards.

    Raises:
        DataError: a shard is missing or no tar file, or there is no sample.
    """

    def __init__(self, path: str, files: Sequence[str]) -> None:
        self.path = path
        self._files = list(files)
        self._indices = [_index(file) for file in files]
        self._ends = array("q", accumulate(len(index.numbers) for index in self._indices))
        sums = [index.sha256 for index in self._indices]
        self.sha256 = hashlib.sha256(repr(sums).encode()).hexdigest()
        if not len(self):
            found = "no sample in the shards"
            raise DataError.at(
                path, got=found, expected="files NAME.json", do="write them with webdataset"
            )

    @property
    def folder(self) -> str:
        """Of the first shard."""
        return str(Path(self._files[0]).parent)

    def __len__(self) -> int:
        return self._ends[-1]

    def source(self, index: int) -> Source:
        """A sample by its name in its shard."""
        shard, number = self._place(index)
        members = self._members(index)
        key = "" if not members else members[0].name.removesuffix(f".{members[0].ending}")
        return Source(self._files[shard], number + 1, f"sample {key}")

    def raw(self, index: int) -> bytes:
        """What the sample's headers say, and its text."""
        shard, _ = self._place(index)
        texts = [
            _read(self._files[shard], member.offset, member.size)
            for member in self._members(index)
            if member.ending in ("json", "txt")
        ]
        return repr((self._members(index), texts)).encode("utf-8", "surrogateescape")

    def record(self, index: int) -> dict[str, Any]:
        """The record of a sample, with its media.

        Raises:
            DataError: it has no text, or names some of its files and others not.
        """
        shard, _ = self._place(index)
        file, source = self._files[shard], self.source(index)
        members = {member.ending: member for member in self._members(index)}
        media = {
            member.name: self._held(file, member)
            for member in members.values()
            if member.ending.rpartition(".")[2].lower() in _KINDS
        }
        text = members.get("json") or members.get("txt")
        if text is None:
            raise DataError.at(
                source,
                got=f"the files {shown(list(members))}",
                expected="one that ends in .json, or in .txt",
                do="write the chat of each sample as .json",
            )
        raw = _read(file, text.offset, text.size)
        if text.ending == "txt":
            return _captioned(raw.decode("utf-8", "replace").strip(), _beside(media))
        return _joined(parsed(raw, source), media, source)

    def blocks(self, kept: Sequence[int]) -> tuple[int, ...]:
        """How many samples each shard has."""
        counts = [0] * len(self._files)
        for index in kept:
            counts[bisect_right(self._ends, index)] += 1
        return tuple(count for count in counts if count > 0)

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the shard, and of the sample in it."""
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _members(self, index: int) -> list[_Member]:
        shard, number = self._place(index)
        found = self._indices[shard]
        begin = found.offsets[number]
        end = begin + found.lengths[number]
        with open(self._files[shard], "rb") as file:
            file.seek(begin)
            return [member for at, _, member in _walk(file, self._files[shard], end) if at < end]

    def _held(self, file: str, member: _Member) -> Held:
        stamp = Path(file).stat().st_mtime_ns
        key = f"{member.offset} {member.size} {stamp}"
        return Held(f"{file}/{member.name}", key, partial(_read, file, member.offset, member.size))


def scan_tar(path: str) -> Index:
    """Where the samples of a shard stand: their names are not kept.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no tar file, or cut off.
    """
    index, digest = Index(), hashlib.sha256()
    last, begin, number, end = None, 0, 0, 0
    with open(path, "rb") as file:
        for at, key, member in _walk(file, path):
            digest.update(repr((at, member)).encode("utf-8", "surrogateescape"))
            if key != last:
                index.add(number, begin, (at - begin) if number else 0, 0)
                last, begin, number = key, at, number + 1
            end = member.offset + member.size
    if end > Path(path).stat().st_size:
        raise ValueError("its end is missing")
    index.add(number, begin, end - begin if number else 0, 0)
    index.sha256 = digest.hexdigest()
    return index


def _walk(file: Any, path: str, end: int | None = None) -> Iterator[tuple[int, str, _Member]]:
    """The files of a tar from where it stands: where each begins, its sample's name, the file."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for found in tar:
                name = _NAME.fullmatch(found.name)
                if name is not None and found.isreg():
                    member = _Member(found.name, name[2], found.offset_data, found.size)
                    yield found.offset, name[1], member
                if end is not None and found.offset_data + found.size >= end:
                    return
    except tarfile.TarError as error:
        raise ValueError(f"{path}: {error}") from None


def _index(file: str) -> Index:
    try:
        return kept_index(file, scan_tar)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError.at(
            file,
            got=f"a shard that cannot be read ({reason})",
            expected="a tar file that is not packed",
            do="check the path, or download it again",
        ) from None


def _read(path: str, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _captioned(text: str, media: Mapping[str, list[Held]]) -> Own:
    """A sample without words but a caption, whatever the format of those beside it."""
    asked = [{"type": kind} for kind in _MEDIA for _ in media.get(f"{kind}s", ())]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
    return Own(messages=messages, **media)


def _beside(media: dict[str, Held]) -> dict[str, list[Held]]:
    """Media as columns."""
    columns: dict[str, list[Held]] = {}
    for name, held in media.items():
        kind = _KINDS[name.rpartition(".")[2].lower()]
        columns.setdefault(f"{kind}s", []).append(held)
    return columns


def _joined(record: dict[str, Any], media: dict[str, Held], source: Source) -> dict[str, Any]:
    """A record with its files in the place of their names; where it names none, beside its text."""
    known: dict[str, Held] = {}
    for name, held in media.items():
        base = name.rpartition("/")[2]
        known |= {name: held, base: held, base.partition(".")[2]: held}
    used: set[Held] = set()
    joined: dict[str, Any] = _replaced(record, known, used)
    if not used:
        named = [key for key in _SINGLE if record.get(key)]
        return joined | ({} if named else _beside(media))
    left = [name for name, held in media.items() if held not in used]
    if left:
        raise DataError.at(
            source,
            got=f"the files {shown(left)} that the record does not name, while it names others",
            expected="all of them in it, or none",
            do="name them in the record, or take them out of the shard",
        )
    return joined


def _replaced(value: Any, known: dict[str, Held], used: set[Held], *, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _replaced(each, known, used, key=name) for name, each in value.items()}
    if isinstance(value, list):
        return [_replaced(each, known, used, key=key) for each in value]
    if key in _NAMED and isinstance(value, str) and value in known:
        used.add(known[value])
        return known[value]
    return value
