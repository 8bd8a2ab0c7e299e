"""The harness of all distributed tests: results, failures, hangs, and what stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import ranks as harness
from tests.ranks import GRACE_S, ROOT, RankError, run_ranks, session_pool

LONG_S = 3600


def _sum(x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    y = scale * (x + dist.get_rank())
    dist.all_reduce(y)
    return y


def _describe() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "threads": torch.get_num_threads(),
        "seed": torch.initial_seed(),
        "environment": " ".join(os.environ[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")),
        "left_behind": os.environ.get("LEFT_BEHIND", ""),
        "dtype": str(torch.get_default_dtype()),
    }


def _raise_on(ranks: list[int], *, then_wait: bool = False) -> None:
    print(f"rank {dist.get_rank()} says hello", flush=True)
    dist.barrier()
    if dist.get_rank() in ranks:
        raise ValueError(f"got rank {dist.get_rank()}")
    if then_wait:
        dist.barrier()


def _sleep_on(rank: int) -> None:
    dist.barrier()
    if dist.get_rank() == rank:
        time.sleep(LONG_S)


def _die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), 9)


def _take_signal() -> None:
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def _leave_traces() -> None:
    os.environ["LEFT_BEHIND"] = "x"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)


def _child_of_a_child() -> int:
    return subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({LONG_S})"]).pid


@contextmanager
def _hurried(world_size: int) -> Iterator[list[float]]:
    """The harness's clock stands still until a rank has answered, and then does not wait.

    Yields what it would have waited, in seconds.
    """
    waited_s: list[float] = []

    def wait_once(connections: Sequence[Any], left_s: float) -> list[Any]:
        if len(connections) == world_size:
            return wait(connections)
        waited_s.append(left_s)
        return []

    clock = SimpleNamespace(monotonic=lambda: sum(waited_s), sleep=time.sleep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "time", clock)
        patch.setattr(harness, "wait", wait_once)
        yield waited_s


def _pids(world_size: int) -> list[int]:
    return [description["pid"] for description in run_ranks(_describe, world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_results_come_by_rank(world_size: int) -> None:
    results = run_ranks(_sum, world_size, torch.ones(2), scale=2.0)
    expected = 2.0 * sum(1 + rank for rank in range(world_size))
    assert [result.tolist() for result in results] == [[expected, expected]] * world_size


def test_every_rank_is_its_own_process_with_a_launcher_s_environment() -> None:
    descriptions = run_ranks(_describe, 3)
    assert [description["rank"] for description in descriptions] == [0, 1, 2]
    assert [description["environment"] for description in descriptions] == [
        f"{rank} 3 {rank}" for rank in range(3)
    ]
    assert {description["world_size"] for description in descriptions} == {3}
    assert {description["threads"] for description in descriptions} == {1}
    assert len({description["pid"] for description in descriptions} | {os.getpid()}) == 4


def test_processes_are_reused_at_any_size() -> None:
    three = _pids(3)
    assert _pids(2) == three[:2]
    assert _pids(3) == three


def test_nothing_of_a_run_stays_in_the_next() -> None:
    run_ranks(_leave_traces, 2)
    for description in run_ranks(_describe, 2):
        assert (description["left_behind"], description["dtype"]) == ("", "torch.float32")


def test_an_exception_on_all_ranks_keeps_the_processes() -> None:
    before = _pids(2)
    with pytest.raises(RankError, match="got rank 1") as caught:
        run_ranks(_raise_on, 2, [0, 1])
    assert sorted(caught.value.errors) == [0, 1]
    assert _pids(2) == before


@pytest.mark.slow
def test_an_exception_on_one_rank_names_it_and_does_not_wait_for_the_others() -> None:
    before = _pids(3)
    with _hurried(3) as waited_s, pytest.raises(RankError) as caught:
        run_ranks(_raise_on, 3, [1], then_wait=True)
    assert waited_s == [GRACE_S]
    assert list(caught.value.errors) == [1]
    assert "ValueError: got rank 1" in caught.value.errors[1]
    assert "rank 1 says hello" in caught.value.errors[1]
    message = str(caught.value)
    assert "rank 0 was still running" in message
    assert "barrier" in message  # the stack of the rank that waited
    assert not set(_pids(3)) & set(before)


@pytest.mark.slow
def test_a_hang_is_a_timeout_that_names_the_rank() -> None:
    before = _pids(2)
    run_ranks(_take_signal, 2)  # as the trainer does
    expected = pytest.raises(TimeoutError, match=r"ranks \[1\] had not answered after 7")
    with _hurried(2) as waited_s, expected as caught:
        run_ranks(_sleep_on, 2, 1, timeout_s=7)
    assert waited_s == [7]
    assert "_sleep_on" in str(caught.value)
    assert not set(_pids(2)) & set(before)


def test_a_process_that_dies_is_named_and_replaced() -> None:
    with pytest.raises(RankError, match="exit code -9") as caught:
        run_ranks(_die_on, 2, 0)
    assert 0 in caught.value.errors
    assert run_ranks(_sum, 2, torch.zeros(1))[0].item() == 1


def _wait_for_end_of(pid: int) -> None:
    deadline = time.monotonic() + 300
    while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.05)


def test_the_end_of_a_session_leaves_no_process() -> None:
    pids = [*_pids(2), *run_ranks(_child_of_a_child, 1)]
    session_pool().discard()
    for pid in pids:
        _wait_for_end_of(pid)


def test_what_cannot_travel_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="top level of a test module"):
        run_ranks(lambda: None, 2)
    with pytest.raises(ValueError, match="got world_size 5, expected 1 to 4"):
        run_ranks(_describe, 5)


@pytest.mark.exhaustive
def test_a_worker_ends_with_its_pytest() -> None:
    script = (
        "import os; from tests.ranks import run_ranks; from tests.test_ranks import _describe;"
        "print(run_ranks(_describe, 1)[0]['pid'], flush=True); os._exit(1)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    _wait_for_end_of(int(run.stdout))
