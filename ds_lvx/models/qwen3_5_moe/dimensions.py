"""Qwen3.5 with a mixture of experts for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_lvx.models.dimensions import Model
from ds_lvx.models.qwen2_5_vl.dimensions import SIDE
from ds_lvx.models.qwen3_5 import dimensions as qwen
from ds_lvx.models.qwen3_vl_moe.dimensions import mixture


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`; a token's MLP are the experts that it is
    sent to, and one that all are, whose share a gate sets."""
    text = config.get("text_config", config)
    dense = {**config, "text_config": {**text, "intermediate_size": 0}}
    return mixture(
        qwen.dimensions(dense, name, source),
        text["moe_intermediate_size"],
        experts=text["num_experts"],
        chosen=text["num_experts_per_tok"],
        sparse=text["num_hidden_layers"],
        shared=text["shared_expert_intermediate_size"],
        gated=True,
    )


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    sizes = {
        # layers, width, heads, heads of states' values, width of an expert, experts, chosen
        "35B-A3B": (40, 2048, 16, 32, 512, 256, 8),
        "122B-A10B": (48, 3072, 32, 64, 1024, 256, 8),
        "397B-A17B": (60, 4096, 32, 64, 1024, 512, 10),
    }
    return tuple(_known(size, *numbers) for size, numbers in sizes.items())


def _known(size: str, layers: int, hidden: int, *others: int) -> Model:
    heads, value_heads, expert, experts, chosen = others
    config = {
        **qwen.published(layers, hidden, heads, 2, value_heads, 0, "large"),
        "moe_intermediate_size": expert,
        "shared_expert_intermediate_size": expert,
        "num_experts": experts,
        "num_experts_per_tok": chosen,
    }
    name = f"Qwen/Qwen3.5-{size}"
    return dimensions(config, name, f"config.json of {name}; frames of {SIDE} x {SIDE}")
