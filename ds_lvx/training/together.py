"""What one rank finds wrong is an error on all of them, at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

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
    try:
        result = work()
    # Whatever it is: the other ranks must not wait for this one.
    except Exception as error:
        channel.agree({}, error)
        raise  # a channel of one rank has nobody to tell and raises the error itself
    channel.agree({})
    return result
