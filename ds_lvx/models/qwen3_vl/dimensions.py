"""Qwen3-VL for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ds_lvx.models.dimensions import Model, text_config
from ds_lvx.models.qwen2_5_vl import dimensions as qwen

_SMALL = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
_LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304}


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`; of each layer whose features the text adds
    there is a merger, and what it makes is kept."""
    found = qwen.dimensions(config, name, source)
    mergers = 1 + len(config["vision_config"]["deepstack_visual_indexes"])
    return replace(
        found,
        tower=replace(found.tower, mlp_matrices=2),
        projector_parameters=mergers * found.projector_parameters,
        tower_states=mergers,
    )


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name.

    4B, 8B and 32B as published (their config.json, or one of a model trained from them), the large
    tower as transformers has it by default.
    """
    sizes = {
        # layers, width, heads, MLP
        "2B": (28, 2048, 16, 6144),
        "4B": (36, 2560, 32, 9728),
        "8B": (36, 4096, 32, 12_288),
        "32B": (64, 5120, 64, 25_600),
    }
    return tuple(_known(size, *numbers) for size, numbers in sizes.items())


def _known(size: str, *numbers: int) -> Model:
    config = published(*numbers, small=size in ("2B", "4B"))
    name, side = f"Qwen/Qwen3-VL-{size}", qwen.SIDE
    return dimensions(config, name, f"config.json of {name}-Instruct; frames of {side} x {side}")


def published(layers: int, hidden: int, *others: int, small: bool) -> dict[str, Any]:
    """A config of the numbers of `known`; a small model has the small tower, and one table."""
    heads, mlp = others
    vision = {
        **(_SMALL if small else _LARGE),
        "num_heads": 16,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "deepstack_visual_indexes": (5, 11, 17) if small else (8, 16, 24),
    }
    own = {"tie_word_embeddings": small, "vision_config": vision}
    of_heads = {"num_key_value_heads": 8, "head_dim": 128}
    return text_config(layers, hidden, heads, mlp, vocabulary=151_936, **of_heads, **own)
