"""Workers for tests of a harness: ranks that fail one after the other, and ranks that stay."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


def fail(folder: Path) -> None:
    """The last words of rank 1 come first, its end second."""
    spoke, number = folder / "rank-1-spoke", folder / "process-of-rank-0"
    if os.environ["RANK"] == "1":
        print("rank 1 is broken", flush=True)
        spoke.touch()
        wait_until(number.exists)
        wait_until(lambda: ended(number.read_text()))
        sys.exit(5)
    wait_until(spoke.exists)
    time.sleep(0.05)  # the clock of files may tick every 10 ms only
    (folder / "written").write_text(str(os.getpid()))
    (folder / "written").rename(number)  # whole when it is there
    sys.exit("rank 0 lost its peer")


def stay(folder: Path) -> None:
    """Says which process it is, and does not end."""
    note = folder / f"noted-{os.environ['RANK']}"
    note.write_text(str(os.getpid()))
    note.rename(note.with_name(f"rank-{os.environ['RANK']}"))
    time.sleep(600.0)


def ended(process: str) -> bool:
    try:
        return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)
