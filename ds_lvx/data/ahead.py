"""The next batch is made while the accelerator works on this one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Calls ``make(place)`` one place ahead, in a thread of its own.

    What ``make`` raises comes out of `get`, at the place where it belongs.

    Args:
        make: a place to what belongs there; must communicate with no other rank.
        step: from one place to the next.
        end: no place from here on is made ahead.
    """

    def __init__(self, make: Callable[[int], T], *, step: int, end: int) -> None:
        self._make = make
        self._step = step
        self._end = end
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ds_lvx-data")
        self._next: tuple[int, Future[T]] | None = None

    def get(self, place: int) -> T:
        """What belongs to a place; the one after it is begun."""
        pending, self._next = self._next, None
        if pending is None or pending[0] != place:
            pending = (place, self._pool.submit(self._make, place))
        after = place + self._step
        if after < self._end:
            self._next = (after, self._pool.submit(self._make, after))
        return pending[1].result()

    def close(self) -> None:
        """End the thread; what it is at is finished, and nothing more begun."""
        self._next = None
        self._pool.shutdown(wait=True, cancel_futures=True)
