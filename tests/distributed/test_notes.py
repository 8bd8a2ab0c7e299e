"""Notes between ranks: left in the job's store, read when something fails, never waited for."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import psutil
import pytest
import torch

from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.failures import open_mailbox
from ds_lvx.distributed.notes import Mailbox, PeerError, explained
from ds_lvx.distributed.shutdown import shutdown
from tests.ranks import FORKED, run_ranks


def exchange_notes() -> list[str | None]:
    """Rank 0 leaves notes with rank 1, which looks after each."""
    world = Channel.world()
    mailbox = open_mailbox(world)
    found = []
    for text in ("first", "second", ""):
        if world.rank == 0:
            mailbox.send(text)
        world.barrier()
        found.append(mailbox.read())
        world.barrier()
    with pytest.raises(RuntimeError, match="unexplained"), explained():
        raise RuntimeError("unexplained")
    another = open_mailbox(world)
    if world.rank == 0:
        another.send("third")
    world.barrier()
    if world.rank == 1:
        with pytest.raises(PeerError, match="third"), explained():
            raise RuntimeError("Connection closed by peer")
    assert mailbox.read() is None, "notes of one mailbox are read in another"
    for each in (another, mailbox):
        each.close()
        each.close()
        each.send("nobody hears it")
    assert Mailbox.current() is None, "closed, and still the current one"
    shutdown()
    return found


@pytest.mark.slow
def test_notes_arrive_and_can_be_taken_back() -> None:
    sender, receiver = run_ranks(exchange_notes, 2)
    assert sender == [None] * 3
    assert receiver == ["first", "second", None]


@pytest.fixture
def opened() -> Iterator[Callable[..., list[Mailbox]]]:
    """Opens the mailboxes of some ranks in this process, on a store."""
    made = []

    def open_mailboxes(size: int, store: torch.distributed.Store) -> list[Mailbox]:
        for rank in range(size):
            connection = torch.distributed.PrefixStore("notes", store.clone())
            made.append(Mailbox((connection, store), rank=rank, size=size))
        return made

    yield open_mailboxes
    for mailbox in made:
        mailbox.close()
    Mailbox._unread.clear()


def serve() -> torch.distributed.TCPStore:
    return torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_several_notes_stand_until_each_is_taken_back(opened: Any) -> None:
    first, second, third = opened(3, serve())
    first.send("of 0\nin two lines, é")
    second.send("of 1")
    assert third.read() == "of 0\nin two lines, é"
    assert first.read() == "of 1"
    first.send("")
    assert third.read() == "of 1"
    assert second.read() is None, "a note of one's own explains nothing"
    second.send("")
    assert third.read() is None


def test_rank_0_waits_for_those_who_have_not_read(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has left a note itself needs none; where somebody never looks, the wait ends."""
    first, second, third = opened(3, serve())
    first.send("of 0")
    second.send("of 1")
    for mailbox in (first, second):
        mailbox.close()
    paused = []

    def pause(seconds: float) -> None:
        paused.append(seconds)
        if len(paused) == 3:
            assert third.has_notes()

    monkeypatch.setattr("ds_lvx.distributed.notes.time.sleep", pause)
    Mailbox.wait_for_readers()
    assert len(paused) == 3
    (first, _, _) = opened(3, serve())[3:]
    first.send("nobody reads it")
    first.close()
    monkeypatch.setattr("ds_lvx.distributed.notes._READERS_S", 0)
    Mailbox.wait_for_readers()
    assert len(paused) == 3


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGSTOP])
def test_without_the_store_errors_are_what_they_are(
    ending: signal.Signals, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that serves it has ended; its host has vanished, and no connection says so."""
    here, there = FORKED.Pipe()
    server = FORKED.Process(target=serve_elsewhere, args=(there,))
    server.start()
    try:
        store = torch.distributed.TCPStore("127.0.0.1", here.recv())
        first, second = opened(2, store)
        first._log.append({"rank": 0, "text": "of 0"})
        assert second.has_notes()
        monkeypatch.setattr("ds_lvx.distributed.notes._ANSWER_S", 0.2)
        assert server.pid is not None
        os.kill(server.pid, ending)
        # Until it has acted on it, the server still answers.
        while server.is_alive() and psutil.Process(server.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        unexplained(second)
    finally:
        server.kill()
        server.join()


def serve_elsewhere(there: Connection) -> None:
    """In a process: a store, until that is killed."""
    store = serve()
    there.send(store.port)
    there.recv()


def unexplained(mailbox: Mailbox) -> None:
    assert Mailbox.current() is mailbox
    error = RuntimeError("Connection closed by peer")
    with pytest.raises(RuntimeError) as caught, explained():
        raise error
    assert caught.value is error
    assert error.__cause__ is None
    mailbox.send("nobody reads it")
    assert not mailbox.has_notes()
