"""One rank that trains some steps: their memory, and their times."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import ds_lvx
from bench.peak import meter
from ds_lvx.compare.case import Case, build_model, ds_config, make_batch
from ds_lvx.compare.harness import now, own_device
from ds_lvx.compare.training.rank import by_column, training
from ds_lvx.plan.memory import Setting


@dataclass(frozen=True)
class Weighing:
    """Steps whose memory counts, but for that of the first."""

    case: Case  # what is trained, in bf16 at ZeRO stage 2
    setting: Setting
    frames: tuple[int, ...]  # visual input of a rank, by step
    gathered: bool = False  # visual embeddings are gathered on every rank
    counts_launches: bool = False  # in one more step, on CUDA


def weigh(load: Weighing) -> dict[str, Any]:
    """Train some steps; bytes and seconds of each.

    ``kept_bytes`` (after forward) and ``peak_bytes`` are above what was there before the step,
    ``before_bytes`` of the first. ``step_s`` has the optimizer's time, too; ``processor_s`` is of
    all threads in that time, which neighbours on the machine do not lengthen. ``launches`` are of
    one more step on CUDA where they are asked for, else None.
    """
    config = ds_config(load.setting, load.case, ranks=int(os.environ["WORLD_SIZE"]))
    with own_device():  # where weights are drawn in a moment
        model = build_model(load.case)
    gathers = load.case.family if load.gathered else None
    with training(model, torch.optim.SGD, config, gathers=gathers) as engine:
        del model
        _, *steps = (_weighed(engine, load.case, frames) for frames in load.frames)
        launches = None
        if load.counts_launches and get_accelerator().device_name() == "cuda":
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                _weighed(engine, load.case, load.frames[-1])
            events = found.events() or ()
            launches = sum(event.device_type == DeviceType.CUDA for event in events)
    return {**by_column(steps), "before_bytes": steps[0]["before_bytes"], "launches": launches}


def _weighed(engine: Any, case: Case, frames: int) -> dict[str, float]:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own = range(rank * frames, (rank + 1) * frames)
    batch = make_batch(case, frames=own, total=ranks * frames)
    shard = ds_lvx.shard_batch(batch, model=engine.module, frames="local")
    del batch
    memory = meter()
    memory.reset()
    before = memory.now_bytes()
    begun, worked = now(), time.process_time()
    out = engine(**shard)
    forward, kept = now(), memory.now_bytes() - before
    engine.backward(out.loss)
    backward, peak = now(), memory.peak_bytes() - before
    engine.step()
    return {
        "before_bytes": before,
        "kept_bytes": kept,
        "peak_bytes": peak,
        "forward_s": forward - begun,
        "backward_s": backward - forward,
        "step_s": now() - begun,
        "processor_s": time.process_time() - worked,
        "loss": out.loss.item(),
    }
