"""What is made ahead comes in its order, errors in their place, and nothing outlives its rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from ds_lvx.data import feed as feeds
from ds_lvx.data.feed import Feed, WorkerError

SHARED = Path("/dev/shm")
NEVER_S = 600.0


class _OddError(Exception):
    """Of a kind that does not unpickle."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def starting(log: Path) -> Callable[[int], Tensor]:
    """Notes every start and place in a file; place 3 fails, 4 fails oddly.

    5 ends the process, as soon as there is a file ``taken`` beside the other.
    """

    def make(place: int) -> Tensor:
        with log.open("a") as file:
            file.write(f"{place} ")
        if place == 3:
            raise ValueError("bad sample")
        if place == 4:
            raise _OddError(1, 2)
        if place == 5:
            # Made ahead: a thread may still be sending place 4, which would end with the process.
            assert holds(log.with_name("taken").exists, NEVER_S)
            os.kill(os.getpid(), signal.SIGKILL)
        if place == 6:
            time.sleep(NEVER_S)
        return torch.full((1 << 20,), place)

    with log.open("a") as file:
        file.write("start ")
    return make


def test_in_the_process_itself_each_is_made_when_it_is_taken(tmp_path: Path) -> None:
    with Feed(partial(starting, tmp_path / "log"), workers=0) as feed:
        feed.begin(range(10))
        assert [int(feed.get(place)[0]) for place in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match=r"^bad sample$"):
            feed.get(3)
        with pytest.raises(_OddError):
            feed.get(4)
    assert (tmp_path / "log").read_text() == "start 0 1 2 3 4 "


@dataclass
class Pinnable:
    pinned: bool = False

    def pin_memory(self) -> Pinnable:
        return Pinnable(pinned=True)


def test_what_a_worker_sends_is_pinned_or_says_why_it_could_not_be_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = feeds._Made(3, Pinnable())
    assert feeds._Packed.of(made).opened().value == Pinnable()
    assert feeds._Packed.of(made).pin_memory().value == Pinnable(pinned=True)
    no_pickle = feeds._Packed.of(feeds._Made(3, lambda: 0)).pin_memory()
    assert isinstance(no_pickle.error, WorkerError)
    assert (no_pickle.place, no_pickle.value) == (3, None)

    def full(made: object) -> bytes:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space")

    monkeypatch.setattr(feeds.reduction.ForkingPickler, "dumps", full)
    assert "got no room for a batch in /dev/shm" in str(feeds._Packed.of(made).opened().error)


def holds(condition: Callable[[], bool], limit_s: float = 60.0) -> bool:
    """Whether ``condition`` comes true within ``limit_s``."""
    end = time.monotonic() + limit_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.slow
def test_workers_make_ahead_and_an_end_is_named(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    with Feed(partial(starting, tmp_path / "log"), workers=1) as feed:
        [worker] = feed._workers
        # A launcher's word to the rank, at a moment when the worker has hardly begun.
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(worker.pid, number)
        feed.begin(range(10))
        assert [int(feed.get(place)[0]) for place in range(2)] == [0, 1]
        # A worker that makes ahead has a name in there between a file's opening and its unlinking.
        assert holds(lambda: not list(SHARED.glob(f"torch_{worker.pid}_*")))
        lock = feed._iterator._index_queues[0]._rlock
        assert not (SHARED / f"sem.{lock._semlock.name[1:]}").exists()
        assert int(feed.get(2)[-1]) == 2
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(worker.pid, number)
        with pytest.raises(ValueError, match="bad sample") as caught:
            feed.get(3)
        assert str(caught.value) == "bad sample"
        assert "in make" in caught.value.__notes__[0]
        with pytest.raises(ValueError, match="_OddError: 1 and 2"):
            feed.get(4)
        (tmp_path / "taken").touch()
        with pytest.raises(WorkerError, match=r"--workers: .* ended \(exit code -9\)"):
            feed.get(5)
    assert (tmp_path / "log").read_text() == "start 0 1 2 3 4 5 "
    assert torch.equal(before, torch.get_rng_state()), "the training's random numbers"
    assert not worker.is_alive()


ROOT = Path(__file__).resolve().parents[2]
RANK = """
import sys, time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from ds_lvx.data import feed as feeds
from ds_lvx.data.feed import Feed
from tests.data.test_feed import starting
if __name__ == "__main__":
    feeds = [Feed(partial(starting, Path(sys.argv[1])), workers=1) for _ in range(2)]
    for feed in feeds:
        feed.begin([0, 6, 7])
        feed.get(0)
    began = time.monotonic()
    feeds[0].close()
    took_s = time.monotonic() - began
    print(*(worker.pid for feed in feeds for worker in feed._workers), took_s, flush=True)
    feeds[1].get(6)
"""


@pytest.mark.exhaustive
def test_a_busy_worker_ends_with_its_feed_and_with_its_rank(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "log")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as rank:
        assert rank.stdout is not None
        closed, busy, took_s = rank.stdout.readline().split()
        assert float(took_s) < 300, "a worker's place 6 takes 600 s"
        assert not psutil.pid_exists(int(closed))
        worker = psutil.Process(int(busy))
        rank.kill()
    psutil.wait_procs([worker], timeout=300)
    assert not worker.is_running()
