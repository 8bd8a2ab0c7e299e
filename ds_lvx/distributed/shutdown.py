"""Ending a distributed run so that the process exits cleanly."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from torch import nn

from ds_lvx.distributed import channel
from ds_lvx.distributed.channel import Channel, ProcessGroup
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.distributed.notes import Mailbox
from ds_lvx.distributed.start import remove_shared_memory

_engines: WeakSet[Any] = WeakSet()
# Where DeepSpeed 0.19.8 keeps process groups, or lists of them.
_NAMES_OF_GROUPS = {
    # its engine
    "all_to_all_group",
    "data_parallel_group",
    "expert_data_parallel_group",
    "expert_parallel_group",
    "local_all_to_all_group",
    "seq_data_parallel_group",
    "seq_parallel_group",
    # its optimizers
    "all2all_process_group",
    "autoep_folding_tp_group",
    "dp_process_group",
    "ep_process_group",
    "expert_dp_process_group",
    "model_parallel_group",
    "real_dp_process_group",
    "sub_group_process_groups",
    # what ZeRO-3 partitions with
    "ds_process_group",
    "zero_param_parallel_group",
    "zero_param_process_group",
    # parameters
    "_dp_group",
    "ds_zero_param_process_group",
    "ds_zero_partition_process_group",
}


def remember(engine: Any) -> None:
    """Let the next `shutdown` take the groups of an engine, or of a module that shall be one's.

    It is found again whether or not the script hands it to `shutdown`.
    """
    _engines.add(engine)


def shutdown(engine: Any = None) -> None:
    """End the engine, the sequence-parallel groups and ``torch.distributed`` in this process.

    A process that just returns after training aborts now and then (SIGABRT, exit code -6): gloo's
    thread drops its last references into an interpreter that is going down. Call this last, on
    every rank; the engine and process groups are of no use afterwards. In a ``finally`` under an
    exception, or when a rank has run out of memory, it waits for no rank, so that one that failed
    can leave and the launcher can end the others. Only rank 0 stays for up to 10 seconds, until
    the others have read which rank it was.

    Args:
        engine: what `ds_lvx.initialize` returned; None when there is none.

    Collectives: a barrier over all ranks, unless something has failed.
    """
    if channel.is_initialized() and not _has_failed():
        Channel.world().barrier()
        remove_shared_memory()
    session = getattr(engine, "ds_lvx", None)
    if session is not None:
        session.close()
    # Where a script has ended torch.distributed itself, DeepSpeed misses its rank in there.
    if engine is not None and channel.is_initialized():
        engine.destroy()
    while (groups := SequenceParallelGroups.current()) is not None:
        groups.close()
    while (mailbox := Mailbox.current()) is not None:
        mailbox.close()
    _forget_deepspeed()
    gc.collect()
    channel.destroy_all()
    for each in {id(each): each for each in (engine, *_engines, *_half_made())}.values():
        _let_go_of_groups(each)
    _engines.clear()  # what a script holds on to is not asked again by the next
    gc.collect()
    Mailbox.wait_for_readers()


def _has_failed() -> bool:
    """Whether an exception is under way, or some rank has told that it ends."""
    mailbox = Mailbox.current()
    told = mailbox is not None and (mailbox.has_sent or mailbox.has_notes())
    return told or sys.exc_info()[0] is not None


def _let_go_of_groups(engine: Any) -> None:
    """Drop the references to process groups of DeepSpeed's engine, its optimizer and parameters.

    A group's threads live as long as it does, and a script may hold an engine to its end. What
    else the script has stays as it is, and so do groups in there.
    """
    optimizer = getattr(engine, "optimizer", None)
    offload = getattr(optimizer, "parameter_offload", None)
    holders = [owner for owner in (engine, optimizer, offload) if _is_deepspeed_s(owner)]
    for parameter in engine.parameters() if isinstance(engine, nn.Module) else ():
        holders += [parameter, _partitioner(parameter)]
    for holder in holders:
        attributes = getattr(holder, "__dict__", {})
        for name in _NAMES_OF_GROUPS & attributes.keys():
            attributes[name] = None


def _half_made() -> Iterator[Any]:
    """Engines and optimizers of DeepSpeed's that the exception under way has kept from being made.

    Its traceback holds them.
    """
    error = sys.exc_info()[1]
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            owner = frame.f_locals.get("self")
            if _is_deepspeed_s(owner):
                yield owner
        error = error.__cause__ or error.__context__


def _is_deepspeed_s(owner: Any) -> bool:
    return any(kind.__module__.startswith("deepspeed.") for kind in type(owner).__mro__)


def _partitioner(parameter: Any) -> Any:
    """What partitions a parameter of ZeRO-3; the parameter's own functions refer to it."""
    gather = getattr(parameter, "all_gather", None)
    if gather is None:
        return None
    cells = dict(zip(gather.__code__.co_freevars, gather.__closure__ or (), strict=True))
    return cells["self"].cell_contents if "self" in cells else None


def _forget_deepspeed() -> None:
    """Drop what DeepSpeed keeps in its modules: backend, mpu and groups of the last engine, and
    models, which else would stay in memory with all that hangs on them."""
    if "deepspeed" not in sys.modules:
        return
    import deepspeed.comm.comm as deepspeed_comm
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.utils import groups as deepspeed_groups

    FWD_MODULE_STACK.clear()  # it begins with the model of every engine of ZeRO-3
    deepspeed_comm.cdb = None
    deepspeed_groups.mpu = None
    deepspeed_groups.mesh_device = None
    for name, value in list(vars(deepspeed_groups).items()):
        if isinstance(value, ProcessGroup):
            setattr(deepspeed_groups, name, None)
