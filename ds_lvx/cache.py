"""Small JSON files of measurements on this machine, in the user's cache folder.

Losing one costs the time to measure again, so a folder that cannot be written is no error.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def folder() -> Path:
    """``$XDG_CACHE_HOME/ds_lvx``, or ``~/.cache/ds_lvx``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ds_lvx"


def read(name: str) -> dict[str, Any]:
    """What the file of this name holds; nothing where there is no such file, or a damaged one."""
    try:
        found = json.loads((folder() / name).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def update(name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Change a file as one step, though other processes change it as well.

    Args:
        name: of the file.
        change: takes what the file holds and returns what it shall hold.

    Returns:
        What ``change`` returned, also where it cannot be written.
    """
    path = folder() / name
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(path.with_suffix(".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            return change(read(name))
        changed = change(read(name))
        with contextlib.suppress(OSError):
            _replace(path, json.dumps(changed, indent=1) + "\n")
        return changed


def _replace(path: Path, text: str) -> None:
    """Write all of it or nothing: a reader never sees half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
