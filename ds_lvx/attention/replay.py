"""What a checkpointed layer keeps so that its attention runs once, not twice.

A checkpoint function runs what it is given twice: now, and again in backward, to have the
activations that it did not keep. A `Box` belongs to one such call, and to nothing else: the first
pass puts the results of its attention calls in, in order, and the second takes them out instead of
running kernels and collectives again. Which pass is running needs no detection, because the box
lives in the very function that runs twice.

Checkpoints nest. An inner checkpoint runs its first pass again in the outer one's second; it then
takes from the outer box and fills its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import Tensor

T = TypeVar("T")


class _Stack(threading.local):
    """The boxes of the checkpointed functions that this thread is in, outermost first."""

    def __init__(self) -> None:
        self.boxes: list[Box] = []


_stack = _Stack()  # a thread's own: backward runs on autograd's threads


@dataclass
class _Kept:
    """The result of an operation, None once it is taken; and how often its tensors had been written
    to when it was kept, which the layer may do afterwards: they are the ones that it was given."""

    operation: str
    result: Any
    versions: list[int]


class Box:
    """The results of one checkpoint call's attention, from its first pass to its second."""

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._place = 0
        self._first_pass = True

    @contextmanager
    def open(self) -> Iterator[None]:
        """One pass over the checkpointed function."""
        self._place = 0
        _stack.boxes.append(self)
        try:
            yield
        finally:
            _stack.boxes.pop()
            self._first_pass = False

    @property
    def recording(self) -> bool:
        """Whether this is the first pass."""
        return self._first_pass

    def put(self, operation: str, result: Any) -> None:
        """Keep the result of the next operation of the first pass."""
        self._kept.append(_Kept(operation, result, _versions(result)))

    def take(self, operation: str) -> Any:
        """The result of the next operation of a later pass; None when it was taken before.

        A second backward through a retained graph finds nothing any more and computes for real.

        Raises:
            RuntimeError: the first pass did something else at this place, or has written to the
                result since.
        """
        place, self._place = self._place, self._place + 1
        expected = self._kept[place].operation if place < len(self._kept) else "nothing more"
        if expected != operation:
            raise RuntimeError(
                f"recomputation of a checkpointed function: got {operation} as its attention call "
                f"number {place + 1}, expected {expected}, as in the first pass; a checkpointed "
                "function has to do the same in both passes"
            )
        kept = self._kept[place]
        result, kept.result = kept.result, None
        if result is not None and _versions(result) != kept.versions:
            raise RuntimeError(
                f"recomputation of a checkpointed function: the result of {operation}, its "
                f"attention call number {place + 1}, has been changed in place, and is not there "
                "for the second pass; expected it as it was returned: use an operation that is not "
                "in place (out = out * x for out *= x), or change a clone() of it"
            )
        return result


def recording() -> bool:
    """Whether a checkpointed function runs for the first time."""
    return any(box.recording for box in _stack.boxes)


def replaying() -> bool:
    """Whether a checkpointed function runs again, in backward."""
    return any(not box.recording for box in _stack.boxes)


def once(operation: str, compute: Callable[[], T]) -> T:
    """``compute()``, or what it returned in the first pass of the checkpoint that is running.

    Args:
        operation: its name; the passes of a checkpoint have to call the same ones in order.
        compute: returns anything but None. Tensors in tuples are kept without their graph.
    """
    found: Any = None
    for box in _stack.boxes:
        if not box.recording:
            taken = box.take(operation)
            found = taken if found is None else found
    result = compute() if found is None else found
    for box in _stack.boxes:
        if box.recording:
            box.put(operation, _detached(result))
    return cast(T, result if found is None else _detached(result))


def _detached(result: Any) -> Any:
    # Autograd hangs its graph on the very tensor that a Function returns: keep another one.
    if isinstance(result, tuple):
        return tuple(_detached(item) for item in result)
    return result.detach() if isinstance(result, Tensor) else result


def _versions(result: Any) -> list[int]:
    """How often each tensor of a result has been written to."""
    if isinstance(result, tuple):
        return [version for item in result for version in _versions(item)]
    counts = isinstance(result, Tensor) and not result.is_inference()
    return [result._version] if counts else []
