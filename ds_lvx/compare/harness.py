"""One harness for every comparison: a function on ranks in fresh processes, and their samples.

A subject (`operators`, `training`, a script of ``launch``) says what runs on a rank, by a function
of one dataclass, and what its answers mean. What is the same for all of them is here.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from multiprocessing import spawn
from typing import Any, get_type_hints

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from pydantic import TypeAdapter

from ds_lvx.compare.fresh import answer, bind, run_fresh
from ds_lvx.compare.network import MASTER, Lab, Network
from ds_lvx.config import registry
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.shutdown import shutdown
from ds_lvx.distributed.start import init_distributed

SHARDED = tuple(sorted(s for s, entry in registry.SCHEDULES.items() if not entry.same_queries))
"""Schedules of queries that are split."""
GATHERED = "gathered"
"""What others do: the visual tokens gathered on every rank, whose own queries see them all."""
METHODS: Mapping[str, tuple[str, str | None]] = {
    name if schedule is None else f"{name}-{schedule}": (name, schedule)
    for name, entry in registry.METHODS.items()
    if not entry.subgroups  # whose size nobody says
    for schedule in ((*SHARDED, registry.AUTO) if entry.has_schedules else (None,))
} | {GATHERED: (GATHERED, None)}
"""What is compared, by name: the method and lvx's schedule; ``none`` runs on one process."""


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


def on_ranks(function: Callable[[Any], Any], request: Any, ranks: Ranks) -> list[Any]:
    """Call a function of a module in fresh processes, one a rank; what each returned, by rank.

    Its argument, the request, is a dataclass of what JSON has.

    Raises:
        RunError: a rank failed.
        NetworkError: the network cannot be made here.
    """
    process: dict[str, Any] = {"sys_path": sys.path}
    if function.__module__ == "__main__":
        process["init_main_from_path"] = vars(sys.modules["__main__"])["__file__"]
    call = {
        "process": process,
        "module": function.__module__,
        "name": function.__name__,
        "request": asdict(request),
    }
    on_cpu = {"DS_ACCELERATOR": "cpu"} if ranks.device == "cpu" else {}
    run = partial(
        run_fresh,
        __name__,
        call,
        ranks=ranks.count,
        threads=ranks.threads,
        timeout_s=ranks.timeout_s,
        environment={**on_cpu, **ranks.environment},
    )
    if ranks.network is None:
        return run()
    with Lab(ranks.network, ranks=ranks.count, name=f"lvx{os.getpid()}") as lab:
        return run(places=lab.places(), master=MASTER)


def _called(call: Mapping[str, Any]) -> Any:
    """In a rank: the function with its request, as the dataclass that it was."""
    spawn.prepare(call["process"])  # modules are found as where it was asked
    function = getattr(import_module(call["module"]), call["name"])
    hints = get_type_hints(function)
    kind = next(hint for name, hint in hints.items() if name != "return")
    return function(TypeAdapter(kind).validate_python(call["request"]))


@contextmanager
def joined() -> Iterator[torch.device]:
    """In a rank that `on_ranks` started: ``torch.distributed``, and this rank's device."""
    device = own_device()
    if device.type == "cpu":
        bind(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    init_distributed(verbose=False)
    try:
        yield device
    finally:
        shutdown()


def own_device() -> torch.device:
    """The device of this rank, which its tensors are made on from now on."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(accelerator.current_device_name())


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
    answer(_called)
