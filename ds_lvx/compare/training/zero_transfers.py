"""Watching the transfers of DeepSpeed itself: ZeRO's gradients and parameters.

All of them go through one object, DeepSpeed's backend. While `zero_watched` is open, a stand-in
takes its place that tells how long each call, and the wait for its handle, takes. (DeepSpeed's own
logger of communication waits for every transfer where it starts.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed.comm.comm as deepspeed_comm

from ds_lvx.distributed.pending import Clock, Observer, Transfer

ZERO = "zero "
_COLLECTIVES = ("all_", "reduce", "broadcast", "inference_all_reduce", "barrier")
"""How the names of the backend's collectives begin."""


@contextmanager
def zero_watched(observer: Observer, *, clock: Clock) -> Iterator[None]:
    """Call ``observer`` with each transfer of DeepSpeed's backend; named ``"zero all_reduce"``.

    One inside an operator of ds_lvx's (an all-to-all of Ulysses) is told twice, here and there.
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
        self._backend, self._observer, self._clock = backend, observer, clock

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        is_told = callable(found) and name.startswith(_COLLECTIVES)
        return partial(self._told, name, found) if is_told else found

    def _told(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = self._clock()
        result = function(*args, **kwargs)

        def tell(waited: float) -> None:
            self._observer(Transfer(f"{ZERO}{name}", started, waited, self._clock()))

        if hasattr(result, "wait"):
            return _WatchedWork(result, self._clock, tell)
        tell(started)
        return result


class _WatchedWork:
    """A handle of ``torch.distributed``; when its first wait is over, the time it began is told."""

    def __init__(self, work: Any, clock: Clock, tell: Callable[[float], None]) -> None:
        self._work, self._clock, self._tell = work, clock, [tell]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """As of the handle."""
        waited = self._clock()
        result = self._work.wait(*args, **kwargs)
        while self._tell:
            self._tell.pop()(waited)
        return result
