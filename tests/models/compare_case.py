"""A model as `ds-lvx compare` trains it, in one process."""

from __future__ import annotations

from typing import Any

import torch

from ds_lvx.compare.case import Case, Setting, build_model, ds_config, make_batch, part_of
from ds_lvx.sharding import shard_batch
from tests.models.alone_case import patched_by


def compared(
    case: Case, *, frames: int, method: str, recompute: bool = False, checkpoint: str | None = None
) -> tuple[Any, Any]:
    """A model of the case behind a backward on so many frames, and the layout of its batch."""
    model = build_model(case, checkpoint=checkpoint, dtype=torch.float32)
    batch = make_batch(case, frames=range(frames), total=frames, dtype=torch.float32)
    config = ds_config(Setting(method, recompute, False), case, ranks=1)
    patched_by(config, model)
    shard = shard_batch(batch, model=model, frames="local")
    model(**shard).loss.backward()
    return model, shard["ds_lvx"]


def parts_of(model: Any, case: Case) -> set[str]:
    """The parts of a step that its parameters belong to."""
    regions = case.contract().regions()
    return {part_of(name, regions) for name, _ in model.named_parameters()}
