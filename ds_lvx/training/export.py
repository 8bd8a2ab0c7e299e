"""The trained model in Hugging Face's format, whatever the ZeRO stage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import deepspeed
from torch import Tensor, nn

from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.together import together
from ds_lvx.training import disk
from ds_lvx.training.folder import complete
from ds_lvx.training.model import Source


def save_pretrained(
    engine: Any, source: Source, folder: Path, *, world: Channel, adapter: bool
) -> None:
    """Write what ``from_pretrained`` reads: weights, config, and the other files of the base; for
    LoRA the adapter.

    The folder appears when it is complete; one that was there before is replaced.

    Args:
        engine: DeepSpeed's.
        source: the base, whose processor and other files go into the same folder.
        folder: to write to, by rank 0.
        world: all ranks.
        adapter: the model is peft's: write the adapter alone.

    Raises:
        ValueError: rank 0 could not write; on all ranks, with the folder and what is missing.

    Collectives: at stage 3 one all-gather a parameter; two agreements.
    """
    model = engine.module
    partitioned = engine.zero_optimization_stage() == 3
    weights = gather_weights(
        model, partitioned=partitioned, only_trained=adapter, keep=world.rank == 0
    )

    def write() -> None:
        if world.rank != 0:
            return
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        extra = {"save_embedding_layers": False} if adapter else {}
        try:
            with disk.explained(partial, sum(weight.nbytes for weight in weights.values())):
                model.save_pretrained(partial, state_dict=weights, **extra)
                complete(partial, source, adapter=adapter)
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise ValueError(f"the model cannot be written: {error}; make room") from error

    together(world, write)


def gather_weights(
    model: nn.Module, *, partitioned: bool, only_trained: bool, keep: bool
) -> dict[str, Tensor]:
    """A model's state dict on the CPU, whole; tied weights are one tensor, which is saved once.

    Args:
        model: may be partitioned by ZeRO-3.
        partitioned: whether it is.
        only_trained: leave out parameters that do not require a gradient.
        keep: whether this rank wants the weights; the others take part and get an empty dict.

    Collectives: one all-gather a parameter where ``partitioned``, over all ranks.
    """
    weights: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # of what was gathered
    # One parameter at a time: more would fill the accelerator with weights that nobody computes on.
    for name, value in model.state_dict(keep_vars=True).items():
        if only_trained and isinstance(value, nn.Parameter) and not value.requires_grad:
            continue
        first = names.setdefault(id(value), name)
        if first != name:
            if keep:
                weights[name] = weights[first]
            continue
        gathered = partitioned and hasattr(value, "ds_id")
        with deepspeed.zero.GatheredParameters([value] if gathered else [], enabled=gathered):
            if keep:
                weights[name] = value.detach().cpu().clone()
    return weights
