"""GLM-4.1V for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ds_lvx.models.dimensions import Model
from ds_lvx.models.qwen2_5_vl import dimensions as qwen

VISION = {
    "depth": 24,
    "hidden_size": 1536,
    "num_heads": 12,
    "intermediate_size": 13_696,
    "out_hidden_size": 4096,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`. What the tower's config calls its MLP is its
    merger's; MLPs of its layers are as wide as what comes out."""
    vision = config["vision_config"]
    out, merged = vision["out_hidden_size"], vision["spatial_merge_size"] ** 2
    found = qwen.dimensions(config, name, source)
    downsample = merged * vision["hidden_size"] * out
    return replace(
        found,
        tower=replace(found.tower, mlp=out),
        projector_parameters=downsample + out**2 + 3 * out * vision["intermediate_size"],
    )


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    config = qwen.published(40, 4096, 32, 2, 13_696, 151_552, tied=False, vision=VISION)
    name, side = "zai-org/GLM-4.1V-9B", qwen.SIDE
    return (dimensions(config, name, f"config.json of {name}-Thinking; frames of {side} x {side}"),)
