"""Gemma 3 for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_lvx.models.concatenated.dimensions import Merged
from ds_lvx.models.dimensions import Model, among_text, decoder, text_config, tower, tower_config

_EVERY = 6
"""Of so many layers of a published model one sees everything."""
_TEXT = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262_208,
    "sliding_window": 4096,
}
"""What transformers takes where a config does not say it, as 4B's does not."""
_VISION = tower_config(27, 1152, 16, 4304, side=896, patch=14)


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`."""
    text, vision = {**_TEXT, **config["text_config"]}, {**_VISION, **config["vision_config"]}
    count, types = text["num_hidden_layers"], text.get("layer_types")
    every = text.get("sliding_window_pattern", _EVERY)
    full = count // every if types is None else types.count("full_attention")
    layers = decoder(text, count=count)
    return Merged(
        name=name,
        **among_text(layers),
        vocabulary=text["vocab_size"],
        tower=tower(vision),
        tower_tokens=(vision["image_size"] // vision["patch_size"]) ** 2,
        frame_tokens=config.get("mm_tokens_per_image", 256),
        projector_parameters=vision["hidden_size"] * layers.hidden,
        tower_states=1,
        source=source,
        embeddings=1,
        windowed=count - full,
        window=text["sliding_window"],
    )


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    sizes = {
        # layers, width, heads, heads of keys, their size, MLP
        "4b": (34, 2560, 8, 4, 256, 10_240),
        "12b": (48, 3840, 16, 8, 256, 15_360),
        "27b": (62, 5376, 32, 16, 128, 21_504),
    }
    return tuple(_known(size, *numbers) for size, numbers in sizes.items())


def _known(size: str, layers: int, hidden: int, heads: int, *others: int) -> Model:
    kv_heads, head_dim, mlp = others
    own = {"num_key_value_heads": kv_heads, "head_dim": head_dim, "sliding_window": 1024}
    text = text_config(layers, hidden, heads, mlp, vocabulary=_TEXT["vocab_size"], **own)
    name = f"google/gemma-3-{size}-it"
    return dimensions({"text_config": text, "vision_config": {}}, name, f"config.json of {name}")
