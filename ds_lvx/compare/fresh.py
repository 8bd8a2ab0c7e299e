"""Runs a module in fresh processes, one a rank, and collects what they answer.

The parent calls `run_fresh` with the name of a module; the module's ``main`` calls `answer` with
the function that does the work. Request and answers are JSON.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LINES_OF_A_FAILURE = 25
_POLL_S = 0.1
_VICTIMS_S = 2.0


class RunError(RuntimeError):
    """A rank ended with an error; the message has the end of its output."""


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    prefix: Sequence[str] = ()  # a command that runs the rank's, such as ``ip netns exec name``
    # Variables on top of this process's.
    environment: Mapping[str, str] = field(default_factory=dict)


def run_fresh(
    module: str,
    request: Mapping[str, Any],
    *,
    ranks: int,
    threads: int = 1,
    timeout_s: float = 3600,
    environment: Mapping[str, str] | None = None,
    places: Sequence[Place] | None = None,
    master: str = "127.0.0.1",
) -> list[Any]:
    """Run a module that calls `answer` in new processes, one a rank; its answers, by rank.

    RANK and the other variables of a launcher are set; ``environment`` has further ones of all
    ranks. ``places`` are by rank, where they do not all run here, and ``master`` is the address of
    rank 0 as every rank sees it.

    Raises:
        RunError: a rank failed or took too long; all are ended.
    """
    # Where rank 0 is elsewhere, this process cannot try which port is free.
    port = _free_port() if master == "127.0.0.1" else random.randrange(20_000, 30_000)
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "MASTER_ADDR": master,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
        **(environment or {}),
    }
    with tempfile.TemporaryDirectory(prefix="ds_lvx_") as name:
        folder = Path(name)
        path = folder / "request.json"
        path.write_text(json.dumps(request))
        processes = []
        try:
            for rank, place in enumerate([Place()] * ranks if places is None else places):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **shared, **place.environment}
                command = [*place.prefix, sys.executable, "-m", module, str(path)]
                with (folder / f"log-{rank}").open("w") as log:
                    output: Any = {"stdout": log, "stderr": subprocess.STDOUT}
                    processes.append(subprocess.Popen(command, env={**os.environ, **own}, **output))
            _wait(processes, folder, timeout_s)
        finally:
            for process in processes:
                process.kill()  # nothing, where it has ended
                process.wait()
            # DeepSpeed's operator for CPUs leaves a buffer a rank in shared memory for ever.
            for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{master}_{port}_*"):
                buffer.unlink(missing_ok=True)
        return [json.loads((folder / f"answer-{rank}.json").read_text()) for rank in range(ranks)]


def answer(function: Callable[[Any], Any]) -> None:
    """In a rank: call the function with the request, and leave what it returns for the parent."""
    path = Path(sys.argv[1])
    result = function(json.loads(path.read_text()))
    path.with_name(f"answer-{os.environ['RANK']}.json").write_text(json.dumps(result))


def bind(rank: int, ranks: int) -> None:
    """Keep this process, and the threads that it will start, on its share of the cores.

    Where ranks outnumber cores, the scheduler would now and then put one more on a core than on
    another, and every rank waits for the slowest.
    """
    free = sorted(os.sched_getaffinity(0))
    first = rank * len(free) // ranks
    last = max((rank + 1) * len(free) // ranks, first + 1)
    os.sched_setaffinity(0, free[first:last])


def _wait(processes: Sequence[subprocess.Popen[bytes]], folder: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not (failed := _failed(processes)):
        if all(process.poll() == 0 for process in processes):
            return
        if time.monotonic() > deadline:
            raise RunError(_failure(folder, 0, f"was not done after {timeout_s:.0f} s"))
        time.sleep(_POLL_S)
    # The others miss it and end a little later: the rank whose last words are the oldest failed.
    deadline = time.monotonic() + _VICTIMS_S
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    failed = _failed(processes)
    rank = min(failed, key=lambda rank: (folder / f"log-{rank}").stat().st_mtime_ns)
    raise RunError(_failure(folder, rank, f"ended with code {processes[rank].returncode}"))


def _failed(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    return [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]


def _failure(folder: Path, rank: int, what: str) -> str:
    lines = (folder / f"log-{rank}").read_text(errors="replace").splitlines()
    tail = "\n".join(lines[-_LINES_OF_A_FAILURE:])
    return f"rank {rank} {what}; the end of its output:\n{tail}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
