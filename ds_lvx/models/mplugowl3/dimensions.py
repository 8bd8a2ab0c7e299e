"""mPLUG-Owl3 for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ds_lvx.models.dimensions import Model, decoder, text_config, tower, tower_config

_SIGLIP = tower_config(27, 1152, 16, 4304, side=384, patch=14)


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`."""
    vision = config["vision_config"]
    text = decoder(config, count=config["num_hidden_layers"])
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2
    # Inside text layers: queries and the output projection are the text's own.
    cross = replace(text, count=len(config["hyper_layers"]), mlp=0, features_dim=text.hidden)
    return Model(
        name=name,
        text=text,
        cross=cross,
        vocabulary=config["vocab_size"],
        tower=tower(vision),
        tower_tokens=tokens,
        frame_tokens=tokens,
        projector_parameters=vision["hidden_size"] * text.hidden + text.hidden**2,
        tower_states=1,
        source=source,
    )


def _mplug(name: str, *, hidden: int, layers: int, heads: int, kv_heads: int, mlp: int) -> Model:
    own = {"num_key_value_heads": kv_heads, "hyper_layers": range(4), "vision_config": _SIGLIP}
    config = text_config(layers, hidden, heads, mlp, vocabulary=151_851, **own)
    return dimensions(config, f"mPLUG/{name}", f"config.json of mPLUG/{name}")


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    return (
        _mplug("mPLUG-Owl3-1B-241014", hidden=896, layers=24, heads=14, kv_heads=2, mlp=4864),
        _mplug("mPLUG-Owl3-2B-241014", hidden=1536, layers=28, heads=12, kv_heads=2, mlp=8960),
        _mplug("mPLUG-Owl3-7B-240728", hidden=3584, layers=28, heads=28, kv_heads=4, mlp=18_944),
    )
