"""One run at a time in an output folder."""

from __future__ import annotations

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
            lock.acquire()
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
