"""GLM-4.5V for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_lvx.models.dimensions import Model
from ds_lvx.models.glm4v import dimensions as glm
from ds_lvx.models.qwen2_5_vl.dimensions import SIDE, published
from ds_lvx.models.qwen3_vl_moe.dimensions import mixture


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`; a token's MLP are the experts that it is
    sent to and those that all are. Each layer counts as the mean of all, the dense ones among
    them."""
    text = config.get("text_config", config)
    width = text["moe_intermediate_size"]
    return mixture(
        glm.dimensions(config, name, source),
        width,
        experts=text["n_routed_experts" if "n_routed_experts" in text else "num_local_experts"],
        chosen=text["num_experts_per_tok"],
        shared=text["n_shared_experts"] * width,
        sparse=max(text["num_hidden_layers"] - text["first_k_dense_replace"], 0),
    )


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    vision = {**glm.VISION, "intermediate_size": 10_944}
    config = {
        **published(46, 4096, 96, 8, 10_944, 151_552, tied=False, vision=vision),
        "head_dim": 128,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    }
    name = "zai-org/GLM-4.5V"
    return (dimensions(config, name, f"config.json of {name}; frames of {SIDE} x {SIDE}"),)
