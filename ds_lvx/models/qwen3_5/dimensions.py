"""Qwen3.5 for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ds_lvx.models.dimensions import Model, RecurrentLayers, text_config
from ds_lvx.models.qwen2_5_vl.dimensions import SIDE
from ds_lvx.models.qwen3_vl import dimensions as qwen

_EVERY = 4
"""Of so many layers one attends, where a config does not list them."""
_TOWERS = {
    "tiny": {"depth": 12, "hidden_size": 768, "num_heads": 12, "intermediate_size": 3072},
    "small": {"depth": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096},
    "large": {"depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304},
}


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`; of the text's layers some attend, and the
    others carry a state."""
    text = config.get("text_config", config)
    vision = {**config["vision_config"], "deepstack_visual_indexes": ()}
    found = qwen.dimensions({**config, "vision_config": vision}, name, source)
    count, attending = found.cross.count, _attending(text)
    recurrent = RecurrentLayers(
        count=count - attending,
        hidden=found.text.hidden,
        heads=text["linear_num_value_heads"],
        kv_heads=text["linear_num_key_heads"],
        head_dim=text["linear_value_head_dim"],
        mlp=found.text.mlp,
        key_dim=text["linear_key_head_dim"],
        kernel=text["linear_conv_kernel_dim"],
    )
    return replace(
        found,
        text=replace(found.text, gated=True),
        cross=replace(found.cross, count=attending, gated=True),
        recurrent=recurrent,
    )


def _attending(text: Mapping[str, Any]) -> int:
    """Layers that attend."""
    if text.get("layer_types"):
        return list(text["layer_types"]).count("full_attention")
    return int(text["num_hidden_layers"] // text.get("full_attention_interval", _EVERY))


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    sizes = {
        # layers, width, heads, heads of keys, heads of states' values, MLP, tower
        "0.8B": (24, 1024, 8, 2, 16, 3584, "tiny"),
        "2B": (24, 2048, 8, 2, 16, 6144, "small"),
        "4B": (32, 2560, 16, 4, 32, 9216, "small"),
        "9B": (32, 4096, 16, 4, 32, 12_288, "large"),
        "27B": (64, 5120, 24, 4, 48, 17_408, "large"),
    }
    return tuple(_known(size, *numbers) for size, numbers in sizes.items())


def _known(size: str, *numbers: Any) -> Model:
    config = {**published(*numbers), "tie_word_embeddings": size in ("0.8B", "2B", "4B")}
    name = f"Qwen/Qwen3.5-{size}"
    return dimensions(config, name, f"config.json of {name}; frames of {SIDE} x {SIDE}")


def published(layers: int, hidden: int, *others: Any) -> dict[str, Any]:
    """A config of the numbers of `known`."""
    heads, kv_heads, value_heads, mlp, tower = others
    vision = {
        **_TOWERS[tower],
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    own = {
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "vision_config": vision,
    }
    return text_config(layers, hidden, heads, mlp, vocabulary=248_320, **own)
