"""Conversations from a JSONL file in the usual chat format.

One JSON object a line::

    {"messages": [
      {"role": "user", "content": [
        {"type": "video", "video": "clips/a.mp4"},
        {"type": "image", "image": "frames/b.png"},
        {"type": "text", "text": "What happens?"}]},
      {"role": "assistant", "content": "A rabbit wakes up."}]}

or with the media beside the messages, as LLaMA-Factory and ms-swift have it::

    {"messages": [
      {"role": "user", "content": "<video><image>What happens?"},
      {"role": "assistant", "content": "A rabbit wakes up."}],
     "videos": ["clips/a.mp4"], "images": ["frames/b.png"]}

Content that is a plain string is text. Paths are relative to the folder of the JSONL file. What a
line says is honoured or refused: only keys of the object that say nothing about the chat (an id, a
licence) are left alone, and those whose value is null or empty.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np

from ds_lvx.data.conversation import KINDS, Conversation, Medium, Own
from ds_lvx.data.errors import DataError, Source
from ds_lvx.data.formats import convert_of
from ds_lvx.data.formats.messages import parts
from ds_lvx.data.held import Held
from ds_lvx.data.limits import DEFAULT_LIMITS, Limits
from ds_lvx.data.line import Line, is_medium
from ds_lvx.data.opened import open_data
from ds_lvx.data.paths import PathError, media_file


class Chats:
    """The conversations of a data set, each read and checked when it is asked for.

    Args:
        path: of a JSONL file (blank lines are skipped), or of another of `ds_lvx.data.opened`.
        format: of its records, a name of `ds_lvx.data.formats.FORMATS`; None: told by content.
        media_root: folder that relative paths of media begin in; None: that of the file.
        limits: of a line.

    Attributes:
        lines: the records.
        format: of the records.
        blocks: how many samples lie together in a file, in their order.
        folder: that relative paths of media begin in.

    Raises:
        DataError: of the file as a whole; asked for a record, what is wrong with it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        limits: Limits = DEFAULT_LIMITS,
        format: str | None = None,
        media_root: str | Path | None = None,
    ) -> None:
        self.lines, convert = open_data(path, limits=limits)
        self.format, self._convert = convert_of(self.lines, format, convert)
        self.folder = Path(self.lines.folder if media_root is None else media_root)
        if not self.folder.is_dir():
            raise DataError.at(
                "--media_root",
                got=f"{media_root}, which is no folder",
                expected="the folder that paths of media begin in",
                do="correct it",
            )
        self._kept: Sequence[int] = range(len(self.lines))
        self.blocks = self.lines.blocks(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Conversation:
        return Line(self.source(index), self.folder).conversation(self.converted(index))

    def converted(self, index: int) -> dict[str, Any]:
        """A record in our own form; what it names is not looked for.

        Raises:
            DataError: it is not in the format.
        """
        line = self._kept[index]
        record = self.lines.record(line)
        is_own = isinstance(record, Own)
        return record if is_own else self._convert(record, self.lines.source(line))

    def media(self, index: int) -> list[tuple[str, bool]]:
        """Kind of each medium that a record names, and whether it is there.

        Raises:
            DataError: the record is not in the format.
        """
        record = self.converted(index)
        lists = {kind: record.get(f"{kind}s") for kind in KINDS}
        named = [
            (k, value) for k, found in lists.items() if isinstance(found, list) for value in found
        ]
        named += [(p["type"], p.get(p["type"])) for p in parts(record) if p.get("type") in KINDS]
        return [
            (kind, self._is_there(value))
            for kind, value in named
            if kind != "text" and is_medium(kind, value)
        ]

    def _is_there(self, value: Any) -> bool:
        file = value.file if isinstance(value, Medium) else value
        if isinstance(file, list | tuple):
            return all(map(self._is_there, file))
        try:
            return isinstance(file, Held) or media_file(str(file), self.folder) is not None
        except PathError:
            return False

    def source(self, index: int) -> Source:
        """The line of a conversation."""
        return self.lines.source(self._kept[index])

    def without(self, left_out: Collection[int]) -> Chats:
        """The same file, some of its conversations left out."""
        return self._of(n for n in self._kept if n not in left_out)

    def split(self, size: float, *, seed: int) -> tuple[Chats, Chats]:
        """Some of the conversations, chosen at random, and the others; each in the file's order.

        They are those of ``train_test_split`` of Hugging Face's datasets with this seed.

        Args:
            size: how many; below 1 a share of all, rounded up.
            seed: of the choice; the same on every machine.

        Raises:
            DataError: there are no more than that.
        """
        count = int(size) if size >= 1 else math.ceil(size * len(self))
        if count >= len(self):
            raise DataError.at(
                self.lines.path,
                got=f"{len(self):,} samples, of which {count:,} are to be held out",
                expected="more than those",
                do="hold out fewer",
            )
        chosen = np.random.default_rng(seed).permutation(len(self))[:count]
        taken = np.zeros(len(self), dtype=bool)
        taken[chosen] = True
        kept = np.asarray(self._kept)
        return self._of(kept[taken].tolist()), self._of(kept[~taken].tolist())

    def _of(self, lines: Iterable[int]) -> Chats:
        chats = copy(self)
        chats._kept = array("q", lines)
        chats.blocks = self.lines.blocks(chats._kept)
        return chats


def read_conversations(path: str | Path) -> list[Conversation]:
    """Read and check a JSONL file, every line of it.

    Args:
        path: the file; blank lines are skipped.

    Returns:
        The conversations in the order of their lines, at least one.

    Raises:
        DataError: the file is missing or empty, a line is no JSON or not in the chat format, or a
            file that it names does not exist; the message begins with ``file:line``.
    """
    chats = Chats(path)
    return [chats[index] for index in range(len(chats))]
