"""Watching the transfers of DeepSpeed itself: ZeRO's gradients and parameters.

All of them go through one object, DeepSpeed's backend. While `zero_watched` is open, a stand-in
takes its place that tells how long each call, and the wait for its handle, takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed.comm.comm as deepspeed_comm

from ds_lvx.distributed.pending import Clock, Observer, Transfer

ZERO = "zero "
_COLLECTIVES = frozenset(
    (
        "all_reduce",
        "all_reduce_coalesced",
        "inference_all_reduce",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "broadcast",
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_coalesced",
        "all_to_all_single",
        "all_to_all",
        "barrier",
    )
)


@contextmanager
def zero_watched(observer: Observer, *, clock: Clock) -> Iterator[None]:
    """Call ``observer`` with each transfer of DeepSpeed's backend; named ``"zero all_reduce"``.

    Args:
        observer: gets the transfer. One inside an operator of ds_lvx's (an all-to-all of Ulysses)
            is told twice, here and there.
        clock: as in `ds_lvx.distributed.pending.watching`.
    """
    backend = deepspeed_comm.cdb
    deepspeed_comm.cdb = _Watched(backend, observer, clock)
    try:
        yield
    finally:
        deepspeed_comm.cdb = backend


class _Watched:
    """DeepSpeed's backend, but that its collectives are told."""

    def __init__(self, backend: Any, observer: Observer, clock: Clock) -> None:
        self._backend = backend
        self._observer = observer
        self._clock = clock

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        return partial(self._told, name, found) if name in _COLLECTIVES else found

    def _told(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = self._clock()
        result = function(*args, **kwargs)
        tell = partial(self._tell, f"{ZERO}{name}", started)
        if hasattr(result, "wait"):
            return _WatchedWork(result, self._clock, tell)
        tell(started)
        return result

    def _tell(self, name: str, started: float, waited: float) -> None:
        self._observer(Transfer(name, started, waited, self._clock()))


class _WatchedWork:
    """A handle whose first wait is told.

    Args:
        work: of ``torch.distributed``.
        clock: tells the time.
        tell: gets the time at which the wait began, when it is over.
    """

    def __init__(self, work: Any, clock: Clock, tell: Callable[[float], None]) -> None:
        self._work = work
        self._clock = clock
        self._tell: Callable[[float], None] | None = tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """As of the handle."""
        waited = self._clock()
        result = self._work.wait(*args, **kwargs)
        if self._tell is not None:
            self._tell(waited)
            self._tell = None
        return result
