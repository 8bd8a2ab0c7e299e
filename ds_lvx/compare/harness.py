"""One harness for every comparison: a function on ranks in fresh processes, and their samples.

A subject (`operators`, `training`, a script of ``launch``) says what runs on a rank, by a function
of one dataclass, and what its answers mean. What is the same for all of them is here.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from ds_lvx.compare.machine import cores
from ds_lvx.compare.network import MASTER, Lab, Network
from ds_lvx.config import registry
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.shutdown import shutdown
from ds_lvx.distributed.start import init_distributed
from ds_lvx.plan.units import at_least

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

    Its argument, the request, is a dataclass of what JSON has. With ``joins`` the ranks have joined
    ``torch.distributed``, and on a CPU each stays on its share of the cores.

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
        "joins": joins,
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
    request = TypeAdapter(kind).validate_python(call["request"])
    if not call["joins"]:
        return function(request)
    if own_device().type == "cpu":
        bind(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    init_distributed(verbose=False)
    try:
        return function(request)
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
