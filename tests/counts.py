"""What a rank does while a test watches: kernels, messages, boxes of checkpointed layers."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import ds_lvx
from ds_lvx.attention.replay import Box
from ds_lvx.kernels.native import NativeKernel

_LET_GO_S = 60.0


class Counts:
    """Kernels and messages of this rank, of all that runs inside."""

    def __enter__(self) -> Counts:
        self.forwards = self.backwards = 0
        self._originals = NativeKernel.forward, NativeKernel.fold, NativeKernel.backward
        NativeKernel.forward = self._counting("forwards", NativeKernel.forward)
        NativeKernel.fold = self._counting("forwards", NativeKernel.fold)
        NativeKernel.backward = self._counting("backwards", NativeKernel.backward)
        self._traffic = ds_lvx.traffic()
        self.traffic = self._traffic.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._traffic.__exit__(None, None, None)
        NativeKernel.forward, NativeKernel.fold, NativeKernel.backward = self._originals

    def _counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            setattr(self, name, getattr(self, name) + 1)
            return function(*args, **kwargs)

        return counted

    def figures(self) -> tuple[int, ...]:
        traffic = self.traffic
        control = traffic.control.calls
        return self.forwards, self.backwards, traffic.calls, traffic.bytes_sent, control


def boxes() -> int:
    """Boxes that are alive; another thread may hold one for a moment longer.

    The collector is off meanwhile: what only it can free counts as alive.
    """
    deadline = time.monotonic() + _LET_GO_S
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        while (alive := _boxes()) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        if was_enabled:
            gc.enable()
    return alive


def _boxes() -> int:
    return sum(isinstance(thing, Box) for thing in gc.get_objects())
