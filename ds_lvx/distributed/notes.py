"""A note from a rank that ends, to all others, so that their errors can say why it is gone.

What the others see of a rank that ended is "Connection closed by peer". Its reason cannot be asked
for any more, and the job's store may have ended with it. So it is told beforehand: every rank has a
`Mailbox`, a socket that it reads only when something has failed. A note is one datagram to each.
Sending one never waits, whatever state the other ranks are in, and a rank that computes is not
disturbed. A datagram may get lost: then the error is what it would be without notes.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import torch

# A note is sent before its rank lets go of any connection: it has hardly ever to be waited for.
_WAIT_S = 0.5
_LONGEST = 32768

Record = dict[str, Any]


class PeerError(RuntimeError):
    """Communication failed because another rank ended; the message is that rank's note."""


class Mailbox:
    """Where this rank receives notes, and the addresses of the others.

    Args:
        rank: of this process among all ranks.
        agree: exchanges a record with all ranks, as `Channel.agree` does.

    Attributes:
        address: this rank's, or None where it has no socket.
        has_sent: a note of this rank's stands.

    Collectives: one agreement.
    """

    _open: ClassVar[list[Mailbox]] = []

    def __init__(self, rank: int, agree: Callable[[Record], list[Record]]) -> None:
        self.has_sent = False
        self._rank = rank
        self._notes: dict[int, str] = {}
        self._socket = _open_socket()
        self.address = None if self._socket is None else self._socket.getsockname()
        # Whatever else arrives at the port does not have the job's word.
        records = agree({"address": self.address, "word": secrets.token_hex(8)})
        self._word = records[0]["word"]
        self._addresses = [record["address"] for record in records]
        self._open.append(self)

    @classmethod
    def current(cls) -> Mailbox | None:
        """The newest mailbox that is not closed, or None."""
        return cls._open[-1] if cls._open else None

    def send(self, text: str) -> None:
        """Leave a note with every other rank; an empty one takes back what was sent before."""
        self.has_sent = bool(text)
        if self._socket is None:
            return
        message = json.dumps({"word": self._word, "rank": self._rank, "text": text}).encode()
        self._socket.settimeout(0)
        for rank, address in enumerate(self._addresses):
            if address is not None and rank != self._rank:
                with suppress(OSError):
                    self._socket.sendto(message, tuple(address))

    def read(self) -> str | None:
        """The note of a rank that ended, or None after half a second without one."""
        if not self.has_notes() and len(self._addresses) > 1:
            self._take_what_arrived(_WAIT_S)
        return next(iter(self._notes.values()), None)

    def has_notes(self) -> bool:
        """Whether a note of another rank is here already."""
        self._take_what_arrived(0)
        return bool(self._notes)

    def close(self) -> None:
        """Receive no more. Calling it twice is allowed."""
        if self in self._open:
            self._open.remove(self)
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def _take_what_arrived(self, wait_s: float) -> None:
        if self._socket is None:
            return
        # A time-out and an empty queue are both an OSError.
        with suppress(OSError):
            self._socket.settimeout(wait_s)
            while True:
                self._take(self._socket.recv(_LONGEST))
                self._socket.settimeout(0)

    def _take(self, message: bytes) -> None:
        with suppress(ValueError, KeyError, TypeError):
            note = json.loads(message)
            if note["word"] != self._word:
                return
            self._notes.pop(note["rank"], None)
            if note["text"]:
                self._notes[note["rank"]] = note["text"]


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


def _open_socket() -> socket.socket | None:
    """A socket on the interface that leads to the job's master; None where there is none to have.

    On one machine that is the loopback, which nobody reaches from outside.
    """
    master = os.environ.get("MASTER_ADDR", "localhost")
    try:
        family, kind, *_, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # of a datagram socket: chooses an interface and sends nothing
            address = probe.getsockname()[0]
        mailbox = socket.socket(family, kind)
    except OSError:
        return None
    try:
        mailbox.bind((address, 0))
    except OSError:
        mailbox.close()
        return None
    return mailbox
