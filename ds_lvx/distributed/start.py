"""Starting ``torch.distributed`` by way of DeepSpeed."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from torch.utils import cpp_extension

from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.interfaces import GLOO, interfaces, leading_to_master
from ds_lvx.distributed.slurm import read_slurm

# A build takes under a minute. Ranks that start together wait for the one of them that builds.
_BUILD_TIMEOUT_S = 900.0
_FIRST_WORD_S = 5
_NEXT_WORD_S = 60
_OLD_S = 600
_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_SHARED, _BUFFER = Path("/dev/shm"), "deepspeed_allreduce_buffer"
_HOW_TO_GET_ON = (
    "if no process builds there any more, on this machine or on another that shares the folder, "
    "delete the file: rm"
)


def init_distributed(*, build_timeout_s: float = _BUILD_TIMEOUT_S, **arguments: Any) -> None:
    """``deepspeed.init_distributed`` that says what it waits for.

    On CPUs DeepSpeed builds an operator at its first start, and loads it at every other. PyTorch
    guards both with a file; a process that is killed in there leaves the file behind, and whoever
    comes next waits for it forever, without a word. Here the wait comes first, with a line on each
    node that names the file, and it ends. The file is never removed: nothing in it says who holds
    it, and with a home folder that nodes share, that may be a process of another machine. Where
    gloo would take the loopback, it is told the interface that leads to MASTER_ADDR. A task of srun
    that no other launcher started is told its rank (`ds_lvx.distributed.slurm.read_slurm`), and a
    process that nothing started but its shell that it is the only one (`be_alone`).

    Args:
        build_timeout_s: how long to wait for another process's build, in seconds.
        arguments: as of ``deepspeed.init_distributed``.

    Raises:
        TimeoutError: the file is still there; the error says what to do.
        ValueError: variables of Slurm that make no sense.

    Collectives: the rendezvous of all ranks, unless ``torch.distributed`` runs already.
    """
    if not deepspeed.comm.is_initialized():
        if not read_slurm():
            be_alone()
        operator = _operator()
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"
        if operator is not None:
            wait_for_build(_lock(operator), timeout_s=build_timeout_s, speaks=speaks)
        if speaks:
            tell_of_old_locks(besides=operator)
            remove_dead_buffers()
            if operator is not None and not _library(operator).exists():
                place = _library(operator)
                print(f"ds_lvx: DeepSpeed builds {place}, once, in about a minute", flush=True)
        name_interface(speaks=speaks)
    deepspeed.init_distributed(**arguments)


def be_alone(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Set for a process that no launcher started what one would, of a run of one rank; and say so.

    DeepSpeed would look for MPI, and fail for want of its package.

    Args:
        environ: variables, which are changed.

    Returns:
        Whether they were set; not where a launcher has set its own, or MPI has several processes.
    """
    is_one_of_many = any(environ.get(name, "1") != "1" for name in _OF_MPI)
    if is_one_of_many or "RANK" in environ or "WORLD_SIZE" in environ:
        return False
    ours = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ours |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    for name, value in ours.items():
        environ.setdefault(name, value)
    print(
        "ds_lvx: no launcher started this process, so it is the only rank; several are started by "
        "deepspeed --num_gpus N SCRIPT, torchrun or srun",
        flush=True,
    )
    return True


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def take_device() -> None:
    """Put this rank on the accelerator that has its number on this node (``LOCAL_RANK``).

    Raises:
        ValueError: fewer accelerators are visible to it.
    """
    accelerator, number = get_accelerator(), int(os.environ.get("LOCAL_RANK", "0"))
    if accelerator.device_name() != "cpu" and number >= accelerator.device_count():
        raise ValueError(
            f"got LOCAL_RANK {number} where this process sees {accelerator.device_count()} of the "
            "node's accelerators; expected all of them in every process: under Slurm "
            "--gpus-per-node in place of --gpus-per-task, and --gpu-bind=none; or start fewer "
            "processes, or set CUDA_VISIBLE_DEVICES for all of them alike"
        )
    accelerator.set_device(number)


def name_interface(*, speaks: bool = True) -> None:
    """Tell gloo the interface that leads to MASTER_ADDR, where it would take the loopback.

    The host's name, by which gloo goes, often resolves to nothing that other nodes can reach. What
    the user has set stays.

    Args:
        speaks: say so.
    """
    found = leading_to_master(interfaces(), os.environ)
    if found is not None:
        os.environ[GLOO] = found.name
        if speaks:
            print(
                f"ds_lvx: gloo takes {found.name}, which leads to MASTER_ADDR "
                f"{os.environ['MASTER_ADDR']}, because this host's name resolves to no address "
                f"that other nodes reach; set {GLOO} to take another",
                flush=True,
            )


def remove_dead_buffers(folder: Path = _SHARED, *, now: float | None = None) -> None:
    """Remove buffers of DeepSpeed's CPU operator whose job was killed while it started.

    Those of this user that no process here has open or mapped, and that are older than any start:
    in a container that shares the folder, a job may be one that this process cannot see.

    Args:
        folder: of shared memory.
        now: the time, in seconds as of ``time.time``; None is the clock's.
    """
    now = time.time() if now is None else now
    for buffer in folder.glob(f"{_BUFFER}_{os.getuid()}_*"):
        with suppress(OSError):  # another start may be removing it
            if now - buffer.stat().st_mtime > _OLD_S and not _is_in_use(buffer):
                buffer.unlink()


def _is_in_use(buffer: Path) -> bool:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if str(buffer) in (process / "maps").read_text():
                return True
            if any(buffer.samefile(each) for each in (process / "fd").iterdir() if each.exists()):
                return True
    return False


def remove_shared_memory() -> None:
    """Remove the name of this rank's buffer of DeepSpeed's CPU operator, 66 MiB in /dev/shm.

    However a rank ends then, the memory goes with it. Only behind an agreement of all ranks that
    have started: one that has not mapped the buffer yet would look for it without end.
    """
    parts = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")]
    if all(parts) and hasattr(os, "getuid"):
        names = [_BUFFER, str(os.getuid()), *parts, str(Channel.world().rank)]
        (_SHARED / "_".join(names)).unlink(missing_ok=True)


def wait_for_build(
    lock: Path,
    *,
    timeout_s: float,
    speaks: bool = True,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until a build's lock is gone.

    Args:
        lock: the file; need not exist.
        timeout_s: how long, in seconds.
        speaks: say so, after 5 seconds and then every minute.
        sleep: waits for some seconds.

    Raises:
        TimeoutError: it is still there.
    """
    waited_s = 0.0
    next_word_s = _FIRST_WORD_S
    while (since := _since(lock)) is not None:
        if waited_s >= timeout_s:
            raise TimeoutError(
                f"got {lock}, the lock of an extension build, there since {since}; expected the "
                f"build to end within {timeout_s:g} s; {_HOW_TO_GET_ON} {lock}"
            )
        if speaks and waited_s >= next_word_s:
            print(
                f"ds_lvx: waits for the extension build that holds {lock} since {since}, for "
                f"{timeout_s - waited_s:.0f} s more; {_HOW_TO_GET_ON} {lock}",
                flush=True,
            )
            next_word_s += _NEXT_WORD_S
        sleep(0.25)
        waited_s += 0.25


def tell_of_old_locks(*, besides: str | None = None, now: float | None = None) -> None:
    """Name the locks of extension builds that are older than any build takes.

    Nothing waits for them here. What needs such an extension later, as DeepSpeed's optimizers do,
    would wait without a word.

    Args:
        besides: the extension whose lock is left out.
        now: the time, in seconds as of ``time.time``; None is the clock's.
    """
    now = time.time() if now is None else now
    with suppress(OSError):  # no folder to be had, so no build either
        for lock in _lock("").parent.glob("*/lock"):
            if lock.parent.name != besides and now - lock.stat().st_mtime > _OLD_S:
                print(
                    f"ds_lvx: {lock} is there since {_since(lock)}; what needs that extension "
                    f"waits for it; {_HOW_TO_GET_ON} {lock}",
                    flush=True,
                )


def _operator() -> str | None:
    """The operator that DeepSpeed loads when it starts here, and builds if need be."""
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return None
    name: str = builder.NAME
    return name


def _library(extension: str) -> Path:
    """What the build of an extension makes."""
    return _lock(extension).with_name(f"{extension}.so")


def _lock(extension: str) -> Path:
    """Where PyTorch puts the lock of an extension's build; makes the folder, as PyTorch does."""
    return Path(cpp_extension._get_build_directory(extension, verbose=False), "lock")


def _since(lock: Path) -> str | None:
    """When a lock was taken; None where there is none."""
    try:
        taken = lock.stat().st_mtime
    except OSError:
        return None
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(taken))
