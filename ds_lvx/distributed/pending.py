"""Transfers under way: waiting for them, watching them, and doing without overlap."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from ds_lvx.distributed.notes import explained

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Transfer:
    """One transfer as the host saw it; times are those of the clock (see `watching`).

    On an accelerator `waited_s` to `done_s` is not what its stream waits: there only the stream
    waits, not the host. A clock that looks at the stream tells.

    Attributes:
        collective: ``"all_gather"``, ``"all_to_all"``, ``"send_recv"`` or ``"all_reduce"``, as in
            `ds_lvx.traffic`, or ``"agreement"`` on the control plane.
        started_s: when it was handed to the backend.
        waited_s: when its result was asked for.
        done_s: when its result was there.
    """

    collective: str
    started_s: float
    waited_s: float
    done_s: float

    @property
    def hidden_s(self) -> float:
        """How long this rank had something else to do meanwhile."""
        return self.waited_s - self.started_s

    @property
    def exposed_s(self) -> float:
        """How long this rank waited."""
        return self.done_s - self.waited_s


Observer: TypeAlias = Callable[[Transfer], None]
Clock: TypeAlias = Callable[[], float]
_observers: list[Observer] = []  # not thread-local: backward may run on autograd's own threads
_clocks: list[Clock] = [time.perf_counter]
_at_once: list[object] = []


@contextmanager
def watching(observer: Observer, *, clock: Clock = time.perf_counter) -> Iterator[None]:
    """Call ``observer`` with each `Transfer` of this rank that ends inside.

    Args:
        observer: gets the transfer.
        clock: tells the times of transfers, the innermost's to all observers. One that records an
            event on an accelerator's stream may return the event's number, to be looked up later.
    """
    _observers.append(observer)
    _clocks.append(clock)
    try:
        yield
    finally:
        _observers.remove(observer)
        _clocks.remove(clock)


@contextmanager
def without_overlap() -> Iterator[None]:
    """Wait for every transfer where it starts: what overlap saves shows by comparison."""
    mark = object()
    _at_once.append(mark)
    try:
        yield
    finally:
        _at_once.remove(mark)


@contextmanager
def blocking(collective: str) -> Iterator[None]:
    """A collective that runs inside, from start to end, for the observers."""
    started = _clocks[-1]()
    with explained():
        yield
    _tell(collective, started, started)


class Pending(Generic[T]):
    """A transfer under way. On an accelerator only the stream waits for it, not the host.

    Args:
        collective: its name in `ds_lvx.traffic`; None where nothing is transferred.
        works: handles of ``torch.distributed``.
        finish: makes the result of what arrived.
        keep: buffers that must outlive the transfer.
    """

    def __init__(
        self,
        collective: str | None,
        works: Sequence[Any],
        finish: Callable[[], T],
        keep: Any = None,
    ) -> None:
        self._collective = collective
        self._works = works
        self._finish = finish
        self._keep = keep
        self._started = _clocks[-1]()
        if _at_once:
            self._wait_for_works()

    def wait(self) -> T:
        """Wait for the transfer and return what arrived, once: nothing of it is kept here.

        Raises:
            RuntimeError: a rank has ended; the error says why where that rank left a note. Or it
                has been waited for before.
        """
        self._wait_for_works()
        finish, self._finish = self._finish, _waited_before
        self._keep = None
        return finish()

    def then(self, change: Callable[[T], U]) -> Pending[U]:
        """The same transfer, with what ``change`` makes of its result."""
        return Pending(None, (), lambda: change(self.wait()))

    def _wait_for_works(self) -> None:
        if not self._works:
            return
        waited = _clocks[-1]()
        with explained():
            for work in self._works:
                work.wait()
        self._works = ()
        if self._collective is not None:
            _tell(self._collective, self._started, waited)


def _waited_before() -> Any:
    raise RuntimeError("got a second wait for one transfer; keep what the first one returned")


def _tell(collective: str, started_s: float, waited_s: float) -> None:
    if _observers:
        transfer = Transfer(collective, started_s, waited_s, _clocks[-1]())
        for observer in _observers:
            observer(transfer)
