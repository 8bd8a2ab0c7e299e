"""A note from a rank that ends, to all others, so that their errors can say why it is gone.

What the others see of a rank that ended is "Connection closed by peer", and its reason cannot be
asked for any more. So it is told beforehand: a rank appends its note to a log in the job's
key-value store, and lets go of its connections only when the store has it. The others read the log
only when something has failed. Every question to the store is bounded: one that is gone, or does
not answer, leaves errors as they would be without notes.

The store is served by rank 0, or by torchrun's agent, and ends with that process: see
`wait_for_readers`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import torch

# A rank fails by an error that all have agreed on before it has sent its note.
_NOTE_S = 0.5
_ANSWER_S = 5.0
# Who computes looks only at its next transfer.
_READERS_S = 10.0
_PAUSE_S = 0.05
_KEY = "log"

Record = dict[str, Any]


class PeerError(RuntimeError):
    """Communication failed because another rank ended; the message is that rank's note."""


class Mailbox:
    """This rank's way to leave notes with all ranks, and to read theirs.

    Args:
        store: a connection to the store where the notes are, and the job's own, which serves;
            None: there is none, and notes reach nobody.
        rank, size: this rank among all of them.

    Attributes:
        has_sent: a note of this rank's stands.
    """

    _open: ClassVar[list[Mailbox]] = []
    _unread: ClassVar[list[Mailbox]] = []

    def __init__(self, store: tuple[Any, Any] | None, *, rank: int, size: int) -> None:
        self.has_sent = False
        self._has_read = False
        self._rank, self._size = rank, size
        self._log = _Log(store)
        self._open.append(self)

    @classmethod
    def current(cls) -> Mailbox | None:
        """The newest mailbox that is not closed, or None."""
        return cls._open[-1] if cls._open else None

    def send(self, text: str) -> None:
        """Leave a note with every other rank; an empty one takes back what was sent before."""
        self.has_sent = bool(text)
        if self in self._open:
            self._log.append({"rank": self._rank, "text": text})

    def read(self) -> str | None:
        """The note of a rank that ended, or None after half a second without one."""
        end = time.monotonic() + _NOTE_S
        while (note := self._look()) is None and self._log.answers and time.monotonic() < end:
            time.sleep(_PAUSE_S)
        return note

    def has_notes(self) -> bool:
        """Whether a note of another rank is there already."""
        return self._look() is not None

    def close(self) -> None:
        """Read no more. Calling it twice is allowed."""
        if self in self._open:
            self._open.remove(self)
            # Held, so that the store's server lives on where it is in this process.
            if self._rank == 0 and (self.has_sent or self._has_read):
                self._unread.append(self)
            else:
                self._log.leave()

    @classmethod
    def wait_for_readers(cls) -> None:
        """Rank 0, which may serve the store, waits until all ranks have the notes it knows of.

        Called when this rank's connections have ended, which makes the others look; it waits for
        10 seconds at most, for a rank that computes for longer, or hangs, does not look.
        """
        end = time.monotonic() + _READERS_S
        while cls._unread:
            mailbox = cls._unread[-1]
            notes, readers = mailbox._log.read()
            informed = len(notes.keys() | readers) == mailbox._size
            if informed or not mailbox._log.answers or time.monotonic() > end:
                cls._unread.remove(mailbox)
                mailbox._log.leave()
            else:
                time.sleep(_PAUSE_S)

    def _look(self) -> str | None:
        notes, readers = self._log.read()
        others = [text for rank, text in notes.items() if rank != self._rank]
        if not others:
            return None
        self._has_read = True
        if self._rank not in readers:
            self._log.append({"rank": self._rank})
        return others[0]


class _Log:
    """Records that all ranks append to, in the job's store; never waited for beyond 5 seconds.

    Args:
        store: as of `Mailbox`.

    Attributes:
        answers: whether the store has answered so far.
    """

    def __init__(self, store: tuple[Any, Any] | None) -> None:
        self._store = store

    @property
    def answers(self) -> bool:
        return self._store is not None

    def append(self, record: Record) -> None:
        """Append a record, and wait until the store has it."""
        line = json.dumps(record) + "\n"

        def write(store: Any) -> bool:
            store.append(_KEY, line)
            return bool(store.check([_KEY]))  # answered in turn, behind the line

        self._ask(write)

    def read(self) -> tuple[dict[int, str], set[int]]:
        """The notes that stand by their rank, oldest first, and the ranks that have read any."""
        found = self._ask(lambda store: store.get(_KEY) if store.check([_KEY]) else b"")
        notes: dict[int, str] = {}
        readers: set[int] = set()
        for record in map(json.loads, (found or b"").splitlines()):
            rank, text = record["rank"], record.get("text")
            if text is None:
                readers.add(rank)
                continue
            notes.pop(rank, None)
            if text:
                notes[rank] = text
            elif not notes:
                readers.clear()
        return notes, readers

    def leave(self) -> None:
        """Close the connection; also done for a store that is gone or does not answer."""
        self._store = None

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        if self._store is None:
            return None
        answers: list[Any] = []
        connection, _ = self._store

        def ask() -> None:
            with suppress(Exception):
                answers.append(question(connection))

        # The store's client waits without end for a host that has vanished.
        thread = threading.Thread(target=ask, name="ds_lvx notes", daemon=True)
        try:
            thread.start()
            thread.join(_ANSWER_S)
        except RuntimeError:  # no memory left for a thread
            ask()
        if not answers:
            self.leave()
            return None
        return answers[0]


def explain(error: BaseException) -> PeerError | None:
    """Why communication failed, where another rank's note says it."""
    special = (PeerError, NotImplementedError, torch.OutOfMemoryError)
    mailbox = Mailbox.current()
    if mailbox is None or not isinstance(error, RuntimeError) or isinstance(error, special):
        return None
    note = mailbox.read()
    return None if note is None else PeerError(note)


@contextmanager
def explained() -> Iterator[None]:
    """Raise a `PeerError` in the place of a RuntimeError that another rank's note explains."""
    try:
        yield
    except RuntimeError as error:
        why = explain(error)
        if why is None:
            raise
        raise why from error
