"""Which lines of a data set were found good before, kept beside it.

A line is known by its bytes and by the size and time of every file that it names, under the
settings that it was checked with; only good ones are kept. Several runs and nodes may write at
once: a file's name says what is in it. Where the folder cannot be written, lines are checked again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from ds_lvx.data.chat import Conversation
from ds_lvx.data.held import Held, Stills

FOLDER = ".ds_lvx-checked"
_DIGITS = 32


class CheckedLines:
    """The good lines of one file under one set of settings.

    Args:
        data: the JSONL file.
        settings: all that decides whether a line is good, as text.
    """

    def __init__(self, data: str, settings: str) -> None:
        path = Path(data)
        self._folder = path.parent / FOLDER
        self._prefix = f"{path.name}-{_digest(settings.encode())}-"
        self._known: set[str] = set()
        with contextlib.suppress(OSError):
            for file in self._folder.iterdir():
                if file.name.startswith(self._prefix):
                    self._known.update(file.read_text("ascii", "replace").split())

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def add(self, keys: Iterable[str]) -> None:
        """Keep lines that were found good, by `line_key`."""
        new = sorted(set(keys) - self._known)
        if not new:
            return
        self._known.update(new)
        with contextlib.suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            # A reader may see part of it: it then misses some lines, and checks them again.
            name = f"{self._prefix}{_digest(repr(new).encode())}.txt"
            (self._folder / name).write_text("\n".join(new) + "\n")


def line_key(raw: bytes, conversation: Conversation) -> str:
    """What changes when a line, or a file that it names, does.

    Args:
        raw: the line.
        conversation: what it says.

    Raises:
        OSError: a file is not there any more.
    """
    files = [
        file
        for part in conversation.media
        for file in (part.file.files if isinstance(part.file, Stills) else (part.file,))
    ]
    stamps = [_stamp(file) for file in files]
    said = repr((stamps, conversation.messages))
    return _digest(raw + said.encode("utf-8", "surrogateescape"))


def _stamp(file: str | Held) -> tuple[str, int | str, int]:
    if isinstance(file, Held):
        return file.name, file.key, 0
    status = os.stat(file)
    return file, status.st_size, status.st_mtime_ns


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGITS]
