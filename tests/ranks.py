"""Run a function on several ranks, each a real process with torch.distributed over gloo or NCCL.

    def sum_over_ranks(x):                       # top level of a test module
        y = x + torch.distributed.get_rank()
        torch.distributed.all_reduce(y)
        return y

    def test_sum():
        assert run_ranks(sum_over_ranks, 2, torch.zeros(1)) == [1.0, 1.0]

- The processes are forked at the first use from one that has imported torch, DeepSpeed and
  transformers already (`tests.preloaded`), and serve every later test.
- `fn`, its arguments and its result travel by pickle: `fn` is found by module and name, so it has
  to be at the top level of a module under `tests/` (pytest runs with `--import-mode=importlib` and
  the repository's root on `sys.path`; the name of a module is its path, `tests.attention.test_x`).
- With `device="cuda"` rank i has GPU i, and tensors there travel over NCCL; mark such a test with
  `pytest.mark.gpus(count)`. DS_ACCELERATOR=cuda in pytest's environment makes it the default.
  Ranks share GPUs where there are fewer, which NCCL 2.30 can: NCCL_MULTI_RANK_GPU_ENABLE=1.
- Each run has a fresh process group, seed 0, and the environment variables that a launcher sets.
  Afterwards `ds_lvx.shutdown()` ends the groups, where `fn` has loaded `ds_lvx`.
- What `fn` changes in its process (environment, default dtype, working folder) is put back; what
  it changes in modules is not.
- A run in which some ranks fail and others do not, or which lasts too long, costs its processes:
  they are stopped, and the next run starts new ones.
- Asserts inside `fn` are plain Python: give them a message, or use `torch.testing.assert_close`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from tests.rank_worker import Answer, Leave, Left, Quit, Task, serve

FORKED = get_context("forkserver")
FORKED.set_forkserver_preload(["tests.preloaded"])
MAX_RANKS = 4
DEVICE = "cuda" if os.environ.get("DS_ACCELERATOR") == "cuda" else "cpu"
# Limits against hangs: far above what a loaded machine takes.
RUN_S = 600.0
GRACE_S = 30.0
LEAVE_S = 300.0
QUIT_S = 60.0
STACKS_S = 30.0
OUTERMOST = "in <module>"  # frame of a rank
OUTPUT_CHARACTERS = 6000
ROOT = Path(__file__).resolve().parent.parent


class RankError(Exception):
    """At least one rank raised. `errors` has the text of the traceback by rank."""

    def __init__(self, errors: dict[int, str], *, note: str = "") -> None:
        self.errors = errors
        texts = [f"--- rank {rank} ---\n{text}" for rank, text in sorted(errors.items())]
        super().__init__("\n".join([f"ranks {sorted(errors)} failed", *texts, note]).rstrip())


class _OrderlyRankError(RankError):
    """All ranks raised and have left their group since: the processes can serve on."""


class Worker:
    """One process and this end of its pipe."""

    def __init__(self, rank: int) -> None:
        self.connection, theirs = Pipe()
        self._output = tempfile.NamedTemporaryFile()  # noqa: SIM115  (as long as the process)
        self._mark = 0
        self.busy = False  # has a task that it has not answered
        environment = {
            "DS_ACCELERATOR": "cpu",
            "TOKENIZERS_PARALLELISM": "false",
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
        }
        self.process = FORKED.Process(target=serve, args=(theirs, self._output.name, environment))
        self.process.start()
        theirs.close()

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def send(self, message: Task | Leave | Quit) -> None:
        self.busy = not isinstance(message, Quit)
        # A worker that has died is noticed where its answer is awaited.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)

    def mark_output(self) -> None:
        self._mark = os.fstat(self._output.fileno()).st_size

    def output(self) -> str:
        """What the process has printed since the mark."""
        size = os.fstat(self._output.fileno()).st_size
        start = max(self._mark, size - OUTPUT_CHARACTERS)
        return os.pread(self._output.fileno(), size - start, start).decode(errors="replace")

    def dump_stacks(self) -> None:
        """Let the process print where its threads are."""
        if self.alive and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGUSR1)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for the end; the exit code, None after the timeout."""
        self.process.join(timeout_s)
        return self.process.exitcode

    def stop(self) -> None:
        assert self.process.pid is not None
        for end in (os.killpg, os.kill):  # its children too; as yet it may lead no group
            with contextlib.suppress(ProcessLookupError):
                end(self.process.pid, signal.SIGKILL)
        self.wait()
        self.connection.close()
        self._output.close()


class WorkerPool:
    """The processes of a test session; worker `i` is rank `i` of every run."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []

    def take(self, count: int) -> list[Worker]:
        """The first `count` workers; processes that are missing or dead are started."""
        self._workers += [Worker(rank) for rank in range(len(self._workers), count)]
        for rank, worker in enumerate(self._workers[:count]):
            if not worker.alive:
                worker.stop()
                self._workers[rank] = Worker(rank)
        return self._workers[:count]

    def discard(self) -> None:
        """End all processes; idle ones end by themselves and leave their coverage data."""
        workers, self._workers = self._workers, []
        idle = [worker for worker in workers if not worker.busy]
        for worker in idle:
            worker.send(Quit())
        deadline = time.monotonic() + QUIT_S
        for worker in idle:
            worker.wait(max(0.0, deadline - time.monotonic()))
        for worker in workers:
            worker.stop()


@functools.cache
def session_pool() -> WorkerPool:
    """The pool of this process, at whose end it ends; with the test session in `conftest.py`."""
    pool = WorkerPool()
    atexit.register(pool.discard)  # before multiprocessing waits for its processes
    return pool


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = RUN_S,
    device: str = DEVICE,
    **kwargs: Any,
) -> list[Any]:
    """Call `fn(*args, **kwargs)` on ranks 0 to `world_size - 1` and return the results by rank.

    `device` is `"cpu"` or `"cuda"`: with which backends `torch.distributed` is started. What is
    returned is on the CPU.

    Raises:
        ValueError: `world_size` is not 1 to 4, or `fn` or an argument cannot be pickled.
        RankError: a rank raised or died. The others get half a minute more.
        TimeoutError: ranks had not answered after `timeout_s`; it names them.
    """
    if not 1 <= world_size <= MAX_RANKS:
        raise ValueError(f"got world_size {world_size}, expected 1 to {MAX_RANKS}")
    call = _pickled_call(fn, args, kwargs)
    pool = session_pool()
    try:
        workers = pool.take(world_size)
        results = _run(workers, call, timeout_s=timeout_s, device=device)
    except _OrderlyRankError:
        raise
    except BaseException:  # Ctrl-C and pytest-timeout too: no process may stay half-way
        pool.discard()
        raise
    return results


def _pickled_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    if getattr(fn, "__module__", None) == "__main__":
        raise ValueError(f"got {fn}, which no other process can import; move it into a test module")
    try:
        return pickle.dumps((fn, args, kwargs))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"got a function or an argument that cannot be pickled ({error}); "
            "expected a function at the top level of a test module, and plain data or CPU tensors"
        ) from error


def _run(workers: list[Worker], call: bytes, *, timeout_s: float, device: str) -> list[Any]:
    # The variable keeps the store's server alive during the run.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank, worker in enumerate(workers):
        worker.mark_output()
        worker.send(Task(rank, len(workers), store.port, call, device))
    answers = _collect(workers, timeout_s=timeout_s)
    errors = {rank: answer.error for rank, answer in answers.items() if answer.error is not None}
    silent = [rank for rank in range(len(workers)) if rank not in answers]
    if errors:
        errors = {rank: text + _printed(workers[rank]) for rank, text in errors.items()}
    elif silent:
        raise TimeoutError(
            f"ranks {silent} had not answered after {timeout_s} s{_stacks(workers, silent)}"
        )
    if errors and len(errors) < len(workers):
        raise RankError(errors, note=_stacks(workers, silent))
    left = _leave(workers, package=all(answer.has_shutdown for answer in answers.values()))
    if errors:
        raise RankError(errors) if left else _OrderlyRankError(errors)
    if left:
        raise RankError(left, note="The function itself had returned on every rank.")
    return [pickle.loads(answers[rank].result or b"") for rank in range(len(workers))]


def _collect(workers: list[Worker], *, timeout_s: float) -> dict[int, Any]:
    """The answers by rank; after the first failure the others have a few seconds left."""
    answers: dict[int, Answer | Left] = {}
    ranks = {worker.connection: rank for rank, worker in enumerate(workers)}
    deadline = time.monotonic() + timeout_s
    while ranks and (left_s := deadline - time.monotonic()) > 0:
        for ready in wait(list(ranks), left_s):
            assert isinstance(ready, Connection)
            rank = ranks.pop(ready)
            answers[rank] = _receive(workers[rank])
            if answers[rank].error is not None:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return answers


def _receive(worker: Worker) -> Answer | Left:
    worker.busy = False
    try:
        return worker.connection.recv()
    except (EOFError, ConnectionResetError):
        code = worker.wait()
        return Answer(None, f"the process ended with exit code {code} before it answered\n", False)


def _leave(workers: list[Worker], *, package: bool) -> dict[int, str]:
    """End the groups of a run on all ranks; what went wrong, by rank."""
    for worker in workers:
        worker.send(Leave(package))
    answers = _collect(workers, timeout_s=LEAVE_S)
    errors = {rank: answer.error for rank, answer in answers.items() if answer.error is not None}
    for rank in range(len(workers)):
        if rank not in answers and not errors:
            errors[rank] = f"did not leave its process group within {LEAVE_S} s"
    return {rank: text + _printed(workers[rank]) for rank, text in errors.items()}


def _printed(worker: Worker) -> str:
    output = worker.output()
    return f"printed:\n{output}" if output else ""


def _stacks(workers: list[Worker], ranks: list[int]) -> str:
    """Where the given ranks stand, with what they printed before."""
    for rank in ranks:
        workers[rank].dump_stacks()
    deadline = time.monotonic() + STACKS_S
    for rank in ranks:
        # The outermost frame of the main thread is the last to be printed.
        while workers[rank].alive and OUTERMOST not in workers[rank].output():
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    return "".join(
        f"\n--- rank {rank} was still running and was stopped ---\n{workers[rank].output()}"
        for rank in ranks
    )
