"""Llama-3.2-Vision (mllama) for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ds_lvx.models.dimensions import Model, decoder, encoder, text_config

_MLLAMA_VISION = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "attention_heads": 16,
    "intermediate_size": 5120,
    "vision_output_dim": 7680,
    "image_size": 560,
    "patch_size": 14,
    "max_num_tiles": 4,
}


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`."""
    text, vision = config["text_config"], config["vision_config"]
    cross = len(text["cross_attention_layers"])
    layers = decoder(text, count=text["num_hidden_layers"] - cross)
    tiles = vision["max_num_tiles"]
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    depth = vision["num_hidden_layers"] + vision["num_global_layers"]
    width = vision["hidden_size"]
    return Model(
        name=name,
        text=layers,
        # Whole layers of their own, over features as wide as the text.
        cross=replace(layers, count=cross, features_dim=layers.hidden),
        vocabulary=text["vocab_size"],
        tower=encoder(
            depth, width, heads=vision["attention_heads"], mlp=vision["intermediate_size"]
        ),
        tower_tokens=tiles * tokens,
        frame_tokens=tiles * tokens,
        projector_parameters=vision["vision_output_dim"] * layers.hidden,
        tower_states=vision["num_hidden_layers"],
        source=source,
    )


def _llama_vision(size: str, *, hidden: int, layers: int, heads: int, mlp: int) -> Model:
    cross = list(range(3, layers, 5))
    own = {"num_key_value_heads": 8, "cross_attention_layers": cross}
    text = text_config(layers, hidden, heads, mlp, vocabulary=128_256, **own)
    name = f"meta-llama/Llama-3.2-{size}-Vision"
    source = f"config.json of {name}; a frame is 4 tiles of 1,601 tokens"
    return dimensions({"text_config": text, "vision_config": _MLLAMA_VISION}, name, source)


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    return (
        _llama_vision("11B", hidden=4096, layers=40, heads=32, mlp=14_336),
        _llama_vision("90B", hidden=8192, layers=100, heads=64, mlp=28_672),
    )
