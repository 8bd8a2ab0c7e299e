"""Runs a request in fresh processes, one a rank, and collects what they measured."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_lvx.compare.peak import PROMPT_FREEING
from ds_lvx.compare.rank import Request

_LINES_OF_A_FAILURE = 25
_POLL_S = 0.1


class RunError(RuntimeError):
    """A rank ended with an error; the message has the end of its output."""


def run_fresh(request: Request, *, threads: int = 1, timeout_s: float = 3600) -> list[Any]:
    """Measure a request on ranks that are new processes.

    Args:
        request: what to measure.
        threads: of a rank.
        timeout_s: for the whole run.

    Returns:
        What `ds_lvx.compare.rank.measure` returned, by rank.

    Raises:
        RunError: a rank failed or took too long; all are ended.
    """
    with tempfile.TemporaryDirectory(prefix="ds_lvx_") as name:
        folder = Path(name)
        path = folder / "request.json"
        path.write_text(json.dumps(asdict(request)))
        port = _free_port()
        processes = []
        try:
            for rank in range(request.ranks):
                with (folder / f"log-{rank}").open("w") as log:
                    processes.append(
                        subprocess.Popen(
                            [sys.executable, "-m", "ds_lvx.compare.rank", str(path)],
                            env=_environment(rank, request.ranks, port=port, threads=threads),
                            stdout=log,
                            stderr=subprocess.STDOUT,
                        )
                    )
            _wait(processes, folder, timeout_s)
        finally:
            _end(processes)
            _remove_shared_buffers(port)
        return [
            json.loads((folder / f"answer-{rank}.json").read_text())
            for rank in range(request.ranks)
        ]


def _environment(rank: int, ranks: int, *, port: int, threads: int) -> dict[str, str]:
    return {
        **os.environ,
        **PROMPT_FREEING,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
    }


def _wait(processes: Sequence[subprocess.Popen[bytes]], folder: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes):
        for rank, process in enumerate(processes):
            if process.poll() not in (None, 0):
                raise RunError(_failure(folder, rank, f"ended with code {process.returncode}"))
        if time.monotonic() > deadline:
            raise RunError(_failure(folder, 0, f"was not done after {timeout_s:.0f} s"))
        time.sleep(_POLL_S)
    for rank, process in enumerate(processes):
        if process.returncode != 0:
            raise RunError(_failure(folder, rank, f"ended with code {process.returncode}"))


def _failure(folder: Path, rank: int, what: str) -> str:
    lines = (folder / f"log-{rank}").read_text(errors="replace").splitlines()
    tail = "\n".join(lines[-_LINES_OF_A_FAILURE:])
    return f"rank {rank} {what}; the end of its output:\n{tail}"


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _remove_shared_buffers(port: int) -> None:
    """DeepSpeed's operator for CPUs leaves a buffer a rank in shared memory for ever."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_127.0.0.1_{port}_*"):
        buffer.unlink(missing_ok=True)
