"""Ending a distributed run so that the process exits cleanly."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ds_lvx.distributed import channel
from ds_lvx.distributed.channel import Channel, ProcessGroup
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.distributed.notes import Mailbox


def shutdown(engine: Any = None) -> None:
    """End the engine, the sequence-parallel groups and ``torch.distributed`` in this process.

    A process that just returns after training aborts now and then (SIGABRT, exit code -6): gloo's
    thread drops its last references into an interpreter that is going down. Call this last, on
    every rank; the engine and process groups are of no use afterwards. In a ``finally`` under an
    exception, or when a rank has run out of memory, it waits for nobody, so that a rank that failed
    can leave and the launcher can end the others.

    Args:
        engine: what `ds_lvx.initialize` returned; None when there is none.

    Collectives: a barrier over all ranks, unless something has failed.
    """
    if channel.is_initialized() and not _has_failed():
        Channel.world().barrier()
        _remove_shared_memory()
    session = getattr(engine, "ds_lvx", None)
    if session is not None:
        session.close()
    if engine is not None:
        engine.destroy()
    while (groups := SequenceParallelGroups.current()) is not None:
        groups.close()
    while (mailbox := Mailbox.current()) is not None:
        mailbox.close()
    _forget_deepspeed()
    gc.collect()
    channel.destroy_all()
    _let_go_of_groups()
    gc.collect()


def _has_failed() -> bool:
    """Whether an exception is under way, or some rank has told that it ends."""
    mailbox = Mailbox.current()
    told = mailbox is not None and (mailbox.has_sent or mailbox.has_notes())
    return told or sys.exc_info()[0] is not None


def _let_go_of_groups() -> None:
    """Drop every object's references to process groups: a group's threads live as long as it does.

    The engine, its optimizer, every ZeRO parameter and every autograd graph that passed through an
    all-to-all refer to their groups, and a script holds some of these to its end.
    """
    for holder in gc.get_objects():
        kind = type(holder)
        if issubclass(kind, ModuleType | type) or not kind.__dictoffset__:
            continue
        try:
            # Not getattr, which some objects answer with code of their own.
            attributes = object.__getattribute__(holder, "__dict__")
        except AttributeError:
            continue
        for name in [key for key, value in attributes.items() if _is_group(value)]:
            attributes[name] = None


def _is_group(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(isinstance(item, ProcessGroup) for item in value)
    return isinstance(value, ProcessGroup)


def _forget_deepspeed() -> None:
    """Drop what DeepSpeed keeps in its modules: backend, mpu and groups of the last engine."""
    if "deepspeed" not in sys.modules:
        return
    import deepspeed.comm.comm as deepspeed_comm
    from deepspeed.utils import groups as deepspeed_groups

    deepspeed_comm.cdb = None
    deepspeed_groups.mpu = None
    deepspeed_groups.mesh_device = None
    for name, value in list(vars(deepspeed_groups).items()):
        if isinstance(value, ProcessGroup):
            setattr(deepspeed_groups, name, None)


def _remove_shared_memory() -> None:
    """Remove this rank's file of DeepSpeed's CPU operator, which leaves 66 MiB of memory behind.

    Only behind a barrier: a rank that has not mapped it yet would look for it without end.
    """
    parts = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")]
    if all(parts) and hasattr(os, "getuid"):
        rank = str(Channel.world().rank)
        names = ["deepspeed_allreduce_buffer", str(os.getuid()), *parts, rank]
        Path("/dev/shm", "_".join(names)).unlink(missing_ok=True)
