"""Things made in processes of their own, ahead of who takes them, by PyTorch's DataLoader.

The order is known beforehand, so that what is made is what is taken. A worker is a fresh process
(``spawn``): a fork of one whose threads run gloo and CUDA may hang. It takes as long to start as an
import of PyTorch and transformers, and starts while this process does something else.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing import connection, reduction, resource_tracker, util
from multiprocessing.synchronize import SemLock
from threading import Thread, Timer
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

T = TypeVar("T")
Make = Callable[[Any], T]

AHEAD = 2
"""Things that a worker is given to make before the first of them is taken."""
# What a launcher or a scheduler sends to all processes of a run means the rank.
_OF_THE_RANK = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_GRACE_S = 1.0
_DYING_S = 10.0
_NO_ROOM = "unable to allocate shared memory"


class WorkerError(ValueError):
    """A worker ended, or could not send what it made."""


class Feed(Generic[T]):
    """What belongs to some places, in their order.

    Args:
        start: called once in each process that makes, returns what makes: from a place to what
            belongs there. It must communicate with no rank and touch no accelerator; with workers
            it is pickled. A result that has ``pin_memory()`` is pinned by it.
        workers: processes; 0: each is made when it is taken, in this process.
        pin: pin the results.

    What ``start`` and ``make`` raise comes out of `get`, at the place where it belongs; from a
    worker as the nearest of ``ValueError``, ``NotImplementedError`` and ``RuntimeError``.
    """

    def __init__(self, start: Callable[[], Make[T]], *, workers: int, pin: bool = False) -> None:
        self._places: Iterable[Any] = ()
        self._cold = AHEAD * workers
        loader: DataLoader[Any] = DataLoader(
            _Work(start),
            sampler=self._order(),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=AHEAD if workers > 0 else None,
            multiprocessing_context="spawn" if workers > 0 else None,
            worker_init_fn=_begin,
            pin_memory=pin,
            generator=torch.Generator(),  # its seed is not to be drawn from the training's numbers
        )
        children, names = set(multiprocessing.active_children()), _semaphores()
        with _signals_kept_from_workers() if workers > 0 else nullcontext():
            self._iterator: Any = iter(loader)
        self._workers = set(multiprocessing.active_children()) - children
        self._names = _semaphores() - names

    def __enter__(self) -> Feed[T]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def begin(self, places: Iterable[Any]) -> None:
        """Say what is to be made; once, before the first `get`. Waits for nobody.

        Args:
            places: in the order in which they will be asked for; read as far ahead as is made.
        """
        self._places = places

    def get(self, place: Any) -> T:
        """What belongs to the next place.

        Args:
            place: the next one.

        Raises:
            WorkerError: a worker ended, or could not send what it made.
            Exception: what making it raised.
        """
        while self._cold > 0:
            self._next()
            self._cold -= 1
            if self._cold == 0:  # all workers have what the names are for
                for unlink in self._names:
                    unlink()
        return self._next(place)

    def close(self) -> None:
        """End the workers, whatever they are at, within some seconds."""
        iterator, self._iterator = self._iterator, None
        if iterator is None or not self._workers:
            return
        # Left alone, a worker would finish what it is at, and not hear the signal that ends it.
        timer = Timer(_GRACE_S, self._kill)
        timer.start()
        iterator._shutdown_workers()  # torch 2.13's own, which dropping the iterator calls, too
        timer.cancel()
        self._kill()

    def _order(self) -> Iterator[Any]:
        """None for what keeps the workers at starting, and the places when they are known."""
        yield from [None] * self._cold
        yield from self._places

    def _next(self, place: Any = None) -> Any:
        try:
            made = next(self._iterator).opened()
        # Whatever the loader says of it: what making raised comes inside of what it returns.
        except Exception as error:
            raise WorkerError(self._lost(error)) from error
        assert made.place == place, f"got what belongs to {made.place}; expected {place}"
        if made.error is not None:
            raise made.error
        return made.value

    def _lost(self, error: Exception) -> str:
        # One that is just ending breaks off before it can be seen to have ended: first its sockets
        # close, then its sentinel, and only then the system has its exit code.
        ended = connection.wait([each.sentinel for each in self._workers], timeout=_DYING_S)
        for each in self._workers:
            if each.sentinel in ended:
                each.join()
        codes = [each.exitcode for each in self._workers if each.exitcode is not None]
        if not codes:
            return (
                f"--workers: got a batch that did not come from its worker ({error}); expected it "
                "in shared memory; pass --workers 0"
            )
        return (
            f"--workers: got a data worker that ended (exit code {', '.join(map(str, codes))}); "
            "expected it to live as long as the run; -9 is mostly the system's, for want of memory "
            "(fewer --workers hold fewer batches); --workers 0 needs none"
        )

    def _kill(self) -> None:
        for each in self._workers:
            each.kill()
            each.join()


@dataclass(frozen=True)
class _Made:
    """What was made for a place, or what was wrong."""

    place: Any
    value: Any = None
    error: Exception | None = None

    def pin_memory(self) -> _Made:
        pin = getattr(self.value, "pin_memory", None)
        return self if pin is None else replace(self, value=pin())

    def opened(self) -> _Made:
        return self


@dataclass(frozen=True)
class _Packed:
    """The same on its way, pickled where an error can still be told: in a worker's main thread.

    Tensors lie in shared memory, which has lost its name: it ends with the processes.
    """

    data: bytes

    @classmethod
    def of(cls, made: _Made) -> _Packed:
        try:
            return cls(bytes(reduction.ForkingPickler.dumps(made)))
        except Exception as error:  # noqa: BLE001  a feeder's thread would print it and go on
            text = f"got a batch that cannot be sent from a worker ({error}); pass --workers 0"
            if _NO_ROOM in str(error):
                text = (
                    f"got no room for a batch in /dev/shm ({error}); expected it to hold {AHEAD} "
                    "batches a worker: enlarge it (docker run --shm-size 16g, or --ipc host), or "
                    "pass --workers 0"
                )
            return cls(pickle.dumps(replace(made, value=None, error=WorkerError(text))))

    def pin_memory(self) -> _Made:
        return self.opened().pin_memory()

    def opened(self) -> _Made:
        made: _Made = pickle.loads(self.data)
        return made


class _Work(Dataset[Any]):
    """The places as a data set: ``start`` is called with the first."""

    def __init__(self, start: Callable[[], Make[Any]]) -> None:
        self._start = start
        self._make: Make[Any] | None = None

    def __getitem__(self, place: Any) -> _Made | _Packed:
        away = get_worker_info() is not None
        try:
            if self._make is None:
                self._make = self._start()
            made = _Made(place, None if place is None else self._make(place))
        except Exception as error:  # noqa: BLE001  it belongs to who asks for the place
            made = _Made(place, error=_plain(error) if away else error)
        return _Packed.of(made) if away else made


def _plain(error: Exception) -> Exception:
    """An error of a class that any process can unpickle; where it was raised is a note."""
    kinds = (NotImplementedError, ValueError, RuntimeError)
    kind = next((kind for kind in kinds if isinstance(error, kind)), None)
    text = str(error) if kind is not None else f"{type(error).__name__}: {error}"
    plain = (ValueError if kind is None else kind)(text)
    plain.add_note("in a data worker:\n" + "".join(traceback.format_exception(error)))
    return plain


def _as_it_is(made: Any) -> Any:
    return made


def _begin(worker: int) -> None:
    """In a worker: it ends with its rank, whatever it is at."""
    Thread(target=_end_with_the_rank, daemon=True).start()


def _end_with_the_rank() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _semaphores() -> set[util.Finalize]:
    """What takes the names of this process's semaphores out of /dev/shm.

    Python 3.11 to 3.14 call it at the end, or its tracker does where the process was killed; names
    would stay where both are killed at once.
    """
    registry: Any = vars(util)["_finalizer_registry"]
    unlinks = vars(SemLock)["_cleanup"].__func__
    return {each for each in list(registry.values()) if each._callback is unlinks}


@contextmanager
def _signals_kept_from_workers() -> Iterator[None]:
    """Processes started meanwhile never get the signals that are meant for the rank.

    A mask is inherited, so that it holds from a worker's first moment on. To this process they come
    afterwards. PyTorch's own handler, which raises wherever this process is when a worker ends, is
    taken off again: `Feed.get` says it.
    """
    resource_tracker.ensure_running()  # started later, it would unblock them
    util.get_temp_dir()  # workers put their sockets there, and this process removes it
    on_child = signal.getsignal(signal.SIGCHLD)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RANK)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if on_child is None else on_child)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
