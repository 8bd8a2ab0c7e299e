"""From what a line says of an image or a video to the file that it means."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

_SHOWN = 300


class PathError(ValueError):
    """What is wrong with a path: its ``args`` are got, expected and what to do."""


def media_file(value: str, folder: Path) -> Path:
    """The local file that a line names.

    Args:
        value: an absolute path, one relative to ``folder``, or a ``file:`` address.
        folder: of the file that the line stands in.

    Raises:
        PathError: an address, picture data in the line itself, or no such file.
    """
    if value.startswith("data:"):
        found = f"picture data in the line itself ({cut(value, 40)}, {len(value):,} characters)"
        raise PathError(found, "the path of a local file", "write the data to a file and name it")
    if value.startswith("file:"):
        value = _of_address(value)
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        found = f"the address {cut(value)!r}"
        raise PathError(found, "the path of a local file", "download it first")
    file = folder / value
    try:
        if file.is_file():
            return file
        found = "a folder" if file.is_dir() else "no such file"
    except (OSError, ValueError) as error:  # no right to look, a name too long, a NUL in it
        reason = error.strerror if isinstance(error, OSError) else error
        found = f"a path that cannot be looked up ({reason})"
    expected = f"a path relative to {folder} or an absolute one"
    raise PathError(f"{found}: {cut(str(file))}", expected, "correct the path")


def cut(text: str, length: int = _SHOWN) -> str:
    """As much of a text as a message may hold."""
    return text if len(text) <= length else text[:length] + "..."


def _of_address(value: str) -> str:
    path = value.removeprefix("file:")
    if path.startswith("//"):
        host, slash, rest = path[2:].partition("/")
        if host not in ("", "localhost"):
            do = "copy it here first, or write file:///..."
            raise PathError(f"a file of another host: {cut(value)!r}", "a local file", do)
        path = slash + rest
    # Many write the path as it is; then a % in it stands for itself.
    return path if os.path.exists(path) else unquote(path)
