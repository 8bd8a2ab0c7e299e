"""Qwen2-VL for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ds_lvx.models.dimensions import Model
from ds_lvx.models.qwen2_5_vl import dimensions as qwen

_VISION = {
    "depth": 32,
    "embed_dim": 1280,
    "num_heads": 16,
    "mlp_ratio": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`; the tower's words are its own, and its MLPs
    have no gate."""
    vision = config["vision_config"]
    width = vision["embed_dim"]
    own = {"hidden_size": width, "intermediate_size": int(vision["mlp_ratio"] * width)}
    found = qwen.dimensions({**config, "vision_config": {**vision, **own}}, name, source)
    return replace(found, tower=replace(found.tower, mlp_matrices=2))


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    sizes = {
        # layers, width, heads, heads of keys, MLP, vocabulary
        "2B": (28, 1536, 12, 2, 8960, 151_936),
        "7B": (28, 3584, 28, 4, 18_944, 152_064),
        "72B": (80, 8192, 64, 8, 29_568, 152_064),
    }
    return tuple(_known(size, *numbers) for size, numbers in sizes.items())


def _known(size: str, *numbers: int) -> Model:
    config = qwen.published(*numbers, tied=size == "2B", vision=_VISION)
    name, side = f"Qwen/Qwen2-VL-{size}", qwen.SIDE
    return dimensions(config, name, f"config.json of {name}-Instruct; frames of {side} x {side}")
