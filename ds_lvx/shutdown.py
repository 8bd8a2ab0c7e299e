"""Ending a distributed run so that the process exits cleanly."""

from __future__ import annotations

import gc
import sys
from typing import Any

from ds_lvx import comm
from ds_lvx.comm import Channel
from ds_lvx.groups import SequenceParallelGroups


def shutdown(engine: Any = None) -> None:
    """End the engine, the sequence-parallel groups and ``torch.distributed`` in this process.

    A process that just returns after training aborts now and then (SIGABRT, exit code -6): gloo's
    thread drops its last references into an interpreter that is going down. Call this last, on
    every rank, and keep nothing of the engine alive behind it. In a ``finally`` under an exception
    it waits for nobody, so that a rank that failed can leave and the launcher can end the others.

    Args:
        engine: what `ds_lvx.initialize` returned; None when there is none.

    Collectives: a barrier over all ranks, unless an exception is under way.
    """
    failing = sys.exc_info()[0] is not None
    if comm.is_initialized() and not failing:
        Channel.world().barrier()
    session = getattr(engine, "ds_lvx", None)
    if session is not None:
        session.close()
    if engine is not None:
        engine.destroy()
    del engine
    while (groups := SequenceParallelGroups.current()) is not None:
        groups.close()
    _forget_deepspeed()
    gc.collect()
    comm.destroy_all()
    gc.collect()


def _forget_deepspeed() -> None:
    """Drop what DeepSpeed keeps in its modules: the backend and the mpu of the last engine."""
    if "deepspeed" not in sys.modules:
        return
    import deepspeed.comm.comm as deepspeed_comm
    from deepspeed.utils import groups as deepspeed_groups

    deepspeed_comm.cdb = None
    deepspeed_groups.mpu = None
    deepspeed_groups.mesh_device = None
