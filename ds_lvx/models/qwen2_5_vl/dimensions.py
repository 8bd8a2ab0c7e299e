"""Qwen2.5-VL for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ds_lvx.models.concatenated.dimensions import Merged
from ds_lvx.models.dimensions import Model, among_text, decoder, encoder, text_config

SIDE = 448
"""Pixels of a frame, by side, where nobody says how large it is."""
_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "intermediate_size": 3420,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`; a frame is its share of a temporal patch."""
    text, vision = config.get("text_config", config), config["vision_config"]
    layers = decoder(text, count=text["num_hidden_layers"])
    width, merge = vision["hidden_size"], vision["spatial_merge_size"]
    patches = (SIDE // vision["patch_size"]) ** 2 // vision["temporal_patch_size"]
    tower = encoder(
        vision["depth"], width, heads=vision["num_heads"], mlp=vision["intermediate_size"]
    )
    merged = width * merge**2
    return Merged(
        name=name,
        **among_text(layers),
        vocabulary=text["vocab_size"],
        tower=replace(tower, mlp_matrices=3),
        tower_tokens=patches,
        frame_tokens=patches // merge**2,
        projector_parameters=merged * (merged + layers.hidden),
        tower_states=1,
        source=source,
        embeddings=1 if config.get("tie_word_embeddings", False) else 2,
    )


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    sizes = {
        # layers, width, heads, heads of keys, MLP, vocabulary
        "3B": (36, 2048, 16, 2, 11_008, 151_936),
        "7B": (28, 3584, 28, 4, 18_944, 152_064),
        "32B": (64, 5120, 40, 8, 27_648, 152_064),
        "72B": (80, 8192, 64, 8, 29_568, 152_064),
    }
    return tuple(_known(size, *numbers) for size, numbers in sizes.items())


def _known(size: str, *numbers: int) -> Model:
    # As published; the width that comes out of the tower is the text's.
    vision = {**_VISION, "intermediate_size": 3456 if size == "32B" else 3420}
    config = published(*numbers, tied=size == "3B", vision=vision)
    name = f"Qwen/Qwen2.5-VL-{size}"
    return dimensions(config, name, f"config.json of {name}-Instruct; frames of {SIDE} x {SIDE}")


def published(
    layers: int, hidden: int, *others: int, tied: bool, vision: Mapping[str, Any]
) -> dict[str, Any]:
    """A config of the numbers of `known`."""
    heads, kv_heads, mlp, vocabulary = others
    own = {"num_key_value_heads": kv_heads, "tie_word_embeddings": tied, "vision_config": vision}
    return text_config(layers, hidden, heads, mlp, vocabulary=vocabulary, **own)
