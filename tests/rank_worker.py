"""The process behind one rank of `tests.ranks`: runs functions, one at a time, until told to quit.

Its working directory is the repository's root, so that a test module is importable here by the name
that pytest gives it (`tests.config.test_x`).
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
GROUP_TIMEOUT_S = 1800  # a run ends sooner, and says where its ranks stand


@dataclass(frozen=True)
class Task:
    """What one rank has to run. `call` is a pickled `(fn, args, kwargs)`."""

    rank: int
    world_size: int
    port: int
    call: bytes
    device: str


@dataclass(frozen=True)
class Leave:
    """End the process group of the task before; `package` asks for `ds_lvx.shutdown`."""

    package: bool


@dataclass(frozen=True)
class Quit:
    """End the process."""


@dataclass(frozen=True)
class Answer:
    """What became of a task: a pickled result, or the text of a traceback."""

    result: bytes | None
    error: str | None
    has_shutdown: bool


@dataclass(frozen=True)
class Left:
    """What became of a `Leave`."""

    error: str | None


def _shutdown_function() -> Any:
    """`ds_lvx.shutdown` where the task has imported it: the harness itself imports no ds_lvx."""
    return getattr(sys.modules.get("ds_lvx"), "shutdown", None)


def _environment(task: Task) -> dict[str, str]:
    return {
        "RANK": str(task.rank),
        "WORLD_SIZE": str(task.world_size),
        "LOCAL_RANK": str(_local_rank(task)),
        # No LOCAL_SIZE: with it DeepSpeed opens shared memory between the ranks, once for the life
        # of the process, and a later task with more ranks waits for it forever.
        "LOCAL_WORLD_SIZE": str(task.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(task.port),
    }


def _local_rank(task: Task) -> int:
    return task.rank % torch.cuda.device_count() if task.device == "cuda" else task.rank


def _run(task: Task) -> Answer:
    os.environ.update(_environment(task))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    try:
        fn, args, kwargs = pickle.loads(task.call)
        _as_in_a_fresh_process()
        timeout = datetime.timedelta(seconds=GROUP_TIMEOUT_S)
        # The store is served by the pytest process, on a port that the system chose: no race.
        store = dist.TCPStore("127.0.0.1", task.port, is_master=False, timeout=timeout)
        if task.device == "cuda":
            torch.cuda.set_device(_local_rank(task))
            # fp32 is compared with fp32; accelerate allows TF32.
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        dist.init_process_group(
            BACKENDS[task.device],
            store=store,
            rank=task.rank,
            world_size=task.world_size,
            timeout=timeout,
        )
        found = tree_map_only(torch.Tensor, torch.Tensor.cpu, fn(*args, **kwargs))
        result = pickle.dumps(found)
    except BaseException:  # noqa: BLE001  (SystemExit is an answer of the task as well)
        return Answer(None, traceback.format_exc(), _shutdown_function() is not None)
    return Answer(result, None, _shutdown_function() is not None)


def _as_in_a_fresh_process() -> None:
    """Drop what earlier tasks left in DeepSpeed, where the task's module has imported it.

    The ranks of a run may have served different tests before, and these differ between them then.
    """
    # A task may have had the signal for itself meanwhile, and to register twice changes nothing.
    faulthandler.unregister(signal.SIGUSR1)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if "deepspeed" in sys.modules:
        import deepspeed
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.runtime.zero.partition_parameters import Init

        # The shared-memory operator keeps the size of the first world of its process.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # ZeRO-3 numbers modules and parameters through the life of a process, and leaves a linear
        # function of its own, with another order of gradients, in the place of torch's.
        torch.nn.functional.linear = torch._C._nn.linear
        Init.param_id = 0
        DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    # Collections at the end of a run look at what the run made, not at every module imported.
    gc.freeze()


def _leave(leave: Leave) -> Left:
    try:
        gc.collect()
        shutdown = _shutdown_function()
        if leave.package and shutdown is not None and dist.is_initialized():
            shutdown()
        deepspeed_comm: Any = sys.modules.get("deepspeed.comm.comm")
        if deepspeed_comm is not None:
            # DeepSpeed keeps the first backend of a process; the next task needs its own.
            deepspeed_comm.cdb = None
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()
    except Exception:  # noqa: BLE001  (reported to the test, with its traceback)
        return Left(traceback.format_exc())
    return Left(None)


@contextlib.contextmanager
def _process_state_restored() -> Iterator[None]:
    """Put back what a task may have changed for its whole process."""
    environment, folder, dtype = dict(os.environ), os.getcwd(), torch.get_default_dtype()
    grad_enabled = torch.is_grad_enabled()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad_enabled)


def _end_with_parent() -> None:
    """A worker in an endless loop must not outlive a pytest that was killed."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _serve(connection: Connection) -> None:
    while True:
        message = connection.recv()
        if isinstance(message, Quit):
            return
        with _process_state_restored():
            connection.send(_run(message))
            leave = connection.recv()
            if isinstance(leave, Quit):
                return
            left = _leave(leave)
        connection.send(left)


def serve(connection: Connection, output: str, environment: dict[str, str]) -> None:
    """Serve tasks from the pipe until `Quit` comes or the other end is closed.

    Args:
        connection: this end of the pipe.
        output: file for what is printed.
        environment: of this process.
    """
    # Else the thread that serves a connection spins while who holds it waits for a core.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.setsid()  # its children end with it, and Ctrl-C is for pytest alone
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError):
        _serve(connection)
    sys.stdout.flush()
    sys.stderr.flush()
