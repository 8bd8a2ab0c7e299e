"""A user's script, which holds what it made to its end: ``ending_script.py KIND`` on each rank."""

from __future__ import annotations

import sys
from typing import Any

import deepspeed
import torch

import ds_lvx
from tests.models.mllama_case import ds_config, hard_batch, start_engine

KIND = sys.argv[-1]


class Theirs:
    """Something of the user's that holds a group."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.groups = [group]


def train() -> tuple[Any, ...]:
    config = ds_config(stage=3, sp_size=2, cross={"method": "lvx"}, self_attn="ulysses")
    engine = start_engine(config)
    outputs = []
    for _ in range(2):
        out = engine(**ds_lvx.shard_batch(hard_batch(), model=engine.module))
        engine.backward(out.loss)
        engine.step()
        outputs.append(out)
    return engine, engine.optimizer, outputs


def attend() -> tuple[Any, ...]:
    deepspeed.init_distributed(verbose=False)
    groups = ds_lvx.SequenceParallelGroups.current() or ds_lvx.SequenceParallelGroups(2)
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    methods = (ds_lvx.lv_xattn, ds_lvx.ring_attention, ds_lvx.ulysses_attention)
    outputs = [method(q, q, q) for method in methods]
    for out in outputs:
        out.sum().backward(retain_graph=True)
    if KIND == "failing" and groups.sp_rank == 1:
        raise KeyError("something of the user's")
    return groups, q, outputs


try:
    kept = attend() if KIND == "failing" else (*train(), *attend())
    theirs = Theirs(ds_lvx.SequenceParallelGroups.current().sp_group)
finally:
    # An engine is found without being given.
    ds_lvx.shutdown()
assert not torch.distributed.is_initialized()
assert ds_lvx.SequenceParallelGroups.current() is None
assert isinstance(theirs.group, torch.distributed.ProcessGroup)
assert theirs.groups == [theirs.group]
