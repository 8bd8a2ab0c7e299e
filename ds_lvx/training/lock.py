"""One run at a time in an output folder."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.together import together

NAME = ".lock"


@contextmanager
def held(folder: str | Path, world: Channel) -> Iterator[None]:
    """Keep other runs out of a folder; the operating system lets go of it with this process.

    A file system that has no such locks (Lustre mounted without ``flock``, NFS without its daemon)
    is no error: a run then goes on without one, and says so.

    Args:
        folder: made where it is not there; locked by rank 0.
        world: all ranks.

    Raises:
        ValueError: another run is in it, or it cannot be written; on all ranks.

    Collectives: one agreement.
    """
    lock = FileLock(Path(folder) / NAME, timeout=0)

    def take() -> None:
        if world.rank != 0:
            return
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            if _has_locks(folder):
                lock.acquire()
            else:
                print(
                    f"ds_lvx: warning: the file system of --output_dir {folder} has no locks: "
                    "a second run into it would not be noticed",
                    flush=True,
                )
        except Timeout:
            raise ValueError(
                f"--output_dir: got {folder}, which another run is writing to; expected a folder "
                "of its own for each; name another, or wait until that run has ended"
            ) from None
        except OSError as error:
            raise ValueError(
                f"--output_dir: got {folder}, which cannot be written ({error.strerror}); expected "
                "a folder that can; name another"
            ) from None

    together(world, take)
    try:
        yield
    finally:
        if lock.is_locked:
            Path(lock.lock_file).unlink(missing_ok=True)  # while nobody else can hold it
            lock.release()


def _has_locks(folder: str | Path) -> bool:
    """Whether a file there can be locked. filelock would leave a file that outlasts a killed run,
    and refuse the next one on another node.

    Raises:
        OSError: the folder cannot be written.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
