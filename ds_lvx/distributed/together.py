"""What one rank finds wrong is an error on all of them, at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ds_lvx.distributed.channel import Channel

T = TypeVar("T")


def together(channel: Channel, work: Callable[[], T]) -> T:
    """Do something that may fail on this rank alone, and let all ranks know.

    Args:
        channel: the ranks that must agree.
        work: must not communicate: a rank that fails in it leaves the others where they are.

    Returns:
        What ``work`` returned on this rank.

    Raises:
        ValueError, NotImplementedError, RuntimeError: the work failed on some rank; on all ranks,
            naming those that failed.

    Collectives: one agreement on the control plane.
    """
    return told(channel, lambda: (work(), {}))[0]


def told(
    channel: Channel, work: Callable[[], tuple[T, dict[str, Any]]]
) -> tuple[T, list[dict[str, Any]]]:
    """`together`, with a record of each rank's on the way.

    Args:
        channel, work: as of `together`, but that ``work`` also returns this rank's record, JSON.

    Returns:
        What ``work`` returned on this rank, and the records of all ranks.
    """
    with telling(channel):
        result, record = work()
    return result, channel.agree(record)


@contextmanager
def telling(channel: Channel) -> Iterator[None]:
    """Raise what goes wrong inside on all ranks, which are on their way to an agreement.

    Raises:
        ValueError, NotImplementedError, RuntimeError: as of `together`.
    """
    try:
        yield
    # Whatever it is: the other ranks must not wait for this one.
    except Exception as error:
        channel.agree({}, error)
        raise  # for type checkers: the agreement has raised
