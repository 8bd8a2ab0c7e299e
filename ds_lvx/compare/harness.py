"""One harness for every comparison: a function on ranks in fresh processes, and their samples.

A subject (`operators`, `training`, a script of ``launch``) says what runs on a rank, by a function
of one request, and what its answers mean. What is the same for all of them is here.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import spawn
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from ds_lvx.compare.machine import cores
from ds_lvx.compare.network import Lab, Network, name_of_mine, take_down_left
from ds_lvx.config import registry
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.shutdown import shutdown
from ds_lvx.distributed.start import free_port, init_distributed, take_device
from ds_lvx.plan.units import at_least

GATHERED = "gathered"
"""What others do: the visual tokens gathered on every rank, whose own queries see them all."""
METHODS: Mapping[str, tuple[str, str | None]] = {
    name if schedule is None else f"{name}-{schedule}": (name, schedule)
    for name, entry in registry.METHODS.items()
    if not entry.subgroups  # whose size nobody says
    for schedule in ((*registry.SHARDED, registry.AUTO) if entry.has_schedules else (None,))
} | {GATHERED: (GATHERED, None)}
"""What is compared, by name: the method and lvx's schedule; ``none`` runs on one process."""

_LINES_OF_A_FAILURE = 25
_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1
_VICTIMS_S = 2.0


class RunError(RuntimeError):
    """A rank ended with an error; the message has the end of its output."""


@dataclass(frozen=True)
class Ranks:
    """Where something runs."""

    count: int  # of processes
    threads: int = 1  # of each, on a CPU
    device: str = "cpu"  # ``"cpu"``, or the name of this machine's accelerator
    # Between them, each in a network namespace; None is this machine's own.
    network: Network | None = None
    timeout_s: float = 3600.0  # for the whole run
    environment: Mapping[str, str] = field(default_factory=dict)  # further variables

    @classmethod
    def here(
        cls,
        count: int | None = None,
        threads: int | None = None,
        *,
        device: str = "auto",
        network: str | None = None,
        otherwise: int = 4,
        **more: Any,
    ) -> Ranks:
        """What a command line asks for, or as this machine has it: a rank a device, all cores.

        Without devices there are ``otherwise`` ranks; those of an emulated network are on the CPU.

        Raises:
            ValueError: what this machine has not, or what does not fit each other.
        """
        between = None if network is None else Network.parse(network)
        name = _device(device, between)
        devices = get_accelerator().device_count() if name != "cpu" else 0
        count = (devices or otherwise) if count is None else count
        at_least(1, ranks=count)
        if devices and count > devices:
            raise ValueError(
                f"--ranks: got {count} for {devices} devices; expected one for each rank, or ranks "
                "on the CPU"
            )
        threads = max(cores() // count, 1) if threads is None else threads
        at_least(1, threads=threads)
        return cls(count, threads, name, between, **more)


def _device(name: str, network: Network | None) -> str:
    found: str = get_accelerator().device_name()
    if name == "cpu" or (name == "auto" and network is not None):
        return "cpu"
    if name == "accelerator" and network is not None:
        raise ValueError(
            "--network: got it with --device accelerator, whose ranks would not use the emulated "
            "network but the links between the devices; leave one of both away"
        )
    if name == "accelerator" and found == "cpu":
        raise ValueError("--device: got 'accelerator'; this machine has none; use cpu")
    return found


def on_ranks(
    function: Callable[[Any], Any], request: Any, ranks: Ranks, *, joins: bool = False
) -> list[Any]:
    """Call a function of a module in fresh processes, one a rank; what each returned, by rank.

    The request travels by pickle, the answers are what JSON has. RANK and the other variables of a
    launcher are set. With ``joins`` the ranks have joined ``torch.distributed``, and on a CPU each
    stays on its share of the cores.

    Raises:
        RunError: a rank failed or took too long; all are ended.
        NetworkError: the network cannot be made here.
    """
    process: dict[str, Any] = {"sys_path": sys.path}
    if function.__module__ == "__main__":
        process["init_main_from_path"] = vars(sys.modules["__main__"])["__file__"]
    call = pickle.dumps(process) + pickle.dumps((function, request, joins))
    if ranks.network is None:
        return _run(call, ranks)
    take_down_left()
    with Lab(ranks.network, ranks=ranks.count, name=name_of_mine()) as lab:
        return _run(call, ranks, lab)


def _run(call: bytes, ranks: Ranks, lab: Lab | None = None) -> list[Any]:
    """The answers of new processes, which run this module."""
    # Where rank 0 is elsewhere, this process cannot try which port is free.
    port = free_port() if lab is None else random.randrange(20_000, 30_000)
    shared = {
        "WORLD_SIZE": str(ranks.count),
        "LOCAL_SIZE": str(ranks.count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(ranks.threads),
        **({"DS_ACCELERATOR": "cpu"} if ranks.device == "cpu" else {}),
        **ranks.environment,
        **({} if lab is None else lab.environment),
    }
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="ds_lvx_") as name:
        folder = Path(name)
        request = folder / "request"
        request.write_bytes(call)
        try:
            for rank in range(ranks.count):
                own = {"LOCAL_RANK": str(rank), **shared, "RANK": str(rank)}
                inside = () if lab is None else lab.inside(rank)
                command = [*inside, sys.executable, "-m", __name__, str(request)]
                with (folder / f"log-{rank}").open("w") as log:
                    output: Any = {"stdout": log, "stderr": subprocess.STDOUT}
                    processes.append(subprocess.Popen(command, env={**os.environ, **own}, **output))
            _wait(processes, folder, ranks.timeout_s)
        finally:
            for process in processes:
                process.kill()  # nothing, where it has ended
                process.wait()
            # DeepSpeed's operator for CPUs leaves a buffer a rank in shared memory for ever.
            ours = f"deepspeed_allreduce_buffer_*_{shared['MASTER_ADDR']}_{port}_*"
            for buffer in Path("/dev/shm").glob(ours):
                buffer.unlink(missing_ok=True)
        return [json.loads((folder / f"answer-{rank}").read_text()) for rank in range(ranks.count)]


def _wait(processes: Sequence[subprocess.Popen[bytes]], folder: Path, timeout_s: float) -> None:
    def failed() -> list[int]:
        return [rank for rank, each in enumerate(processes) if each.poll() not in (None, 0)]

    def error(rank: int, what: str) -> RunError:
        lines = (folder / f"log-{rank}").read_text(errors="replace").splitlines()
        tail = "\n".join(lines[-_LINES_OF_A_FAILURE:])
        return RunError(f"rank {rank} {what}; the end of its output:\n{tail}")

    deadline = time.monotonic() + timeout_s
    while not failed():
        if all(process.poll() == 0 for process in processes):
            return
        if time.monotonic() > deadline:
            raise error(0, f"was not done after {timeout_s:.0f} s")
        time.sleep(_POLL_S)
    # The others miss it and end a little later: the rank whose last words are the oldest failed.
    deadline = time.monotonic() + _VICTIMS_S
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    rank = min(failed(), key=lambda rank: (folder / f"log-{rank}").stat().st_mtime_ns)
    raise error(rank, f"ended with code {processes[rank].returncode}")


def _answer(path: Path) -> None:
    """In a rank: call the function, and leave what it returns for the parent.

    Of a parent that is killed nothing goes on: the kernel ends its ranks.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with path.open("rb") as file:
        spawn.prepare(pickle.load(file))  # modules are found as where it was asked
        function, request, joins = pickle.load(file)
    result = _joined(function, request) if joins else function(request)
    path.with_name(f"answer-{os.environ['RANK']}").write_text(json.dumps(result))


def _joined(function: Callable[[Any], Any], request: Any) -> Any:
    if own_device().type == "cpu":
        bind(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    init_distributed(verbose=False)
    try:
        return function(request)
    finally:
        shutdown()


def bind(rank: int, ranks: int) -> None:
    """Keep this process, and the threads that it will start, on its share of the cores.

    Where ranks outnumber cores, the scheduler would now and then put one more on a core than on
    another, and every rank waits for the slowest.
    """
    free = sorted(os.sched_getaffinity(0))
    first = rank * len(free) // ranks
    last = max((rank + 1) * len(free) // ranks, first + 1)
    os.sched_setaffinity(0, free[first:last])


def own_device() -> torch.device:
    """The device of this rank, which its tensors are made on from now on."""
    take_device()
    return torch.device(get_accelerator().current_device_name())


def now() -> float:
    """Seconds of this process's clock, when the accelerator has done all that it was given."""
    get_accelerator().synchronize()
    return time.perf_counter()


def meet(world: Channel) -> float:
    """A barrier for ranks that have done all they were given; the time after it."""
    now()
    world.barrier()
    return now()


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median, 10th and 90th percentile, and all samples."""
    return {
        "median": statistics.median(samples),
        "p10": float(np.percentile(samples, 10)),
        "p90": float(np.percentile(samples, 90)),
        "samples": list(samples),
    }


def slowest(*columns: Iterable[float]) -> list[float]:
    """Seconds of each step on the rank that took longest; a column has the steps of a rank."""
    return [max(times) for times in zip(*columns, strict=True)]


if __name__ == "__main__":
    _answer(Path(sys.argv[1]))
