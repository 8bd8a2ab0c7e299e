"""T5Gemma2 for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ds_lvx.models.dimensions import Model, RowLayers, decoder, text_config, tower, tower_config

_EVERY = 6
"""Of so many layers of a published model one sees everything."""
_VISION = tower_config(27, 1152, 16, 4304, side=896, patch=14)


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`."""
    text, vision = config["encoder"]["text_config"], config["encoder"]["vision_config"]
    count, other = text["num_hidden_layers"], config["decoder"]
    layers, cross = decoder(text, count=count), decoder(other, count=other["num_hidden_layers"])
    cross = replace(cross, features_dim=layers.hidden)
    types = text.get("layer_types")
    full = count // _EVERY if types is None else types.count("full_attention")
    width = vision["hidden_size"]
    return Model(
        name=name,
        text=replace(cross, count=0),  # the decoder's layers look at text and rows at once
        cross=cross,
        vocabulary=other["vocab_size"],
        tower=tower(vision),
        tower_tokens=(vision["image_size"] // vision["patch_size"]) ** 2,
        frame_tokens=config["encoder"].get("mm_tokens_per_image", 256),
        projector_parameters=width * layers.hidden,
        tower_states=1,
        source=source,
        rows=RowLayers(**vars(layers), full=full, window=text["sliding_window"]),
        embeddings=1,
        recomputes=False,
    )


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    sizes = {
        # layers, width, heads, heads of keys, MLP, window
        "270m": (18, 640, 4, 1, 2048, 512),
        "1b": (26, 1152, 4, 1, 6912, 512),
        "4b": (34, 2560, 8, 4, 10_240, 1024),
    }
    return tuple(_known(size, *numbers) for size, numbers in sizes.items())


def _known(size: str, layers: int, hidden: int, heads: int, *others: int) -> Model:
    kv_heads, mlp, window = others
    own = {"num_key_value_heads": kv_heads, "head_dim": 256, "sliding_window": window}
    text = text_config(layers, hidden, heads, mlp, vocabulary=262_144, **own)
    config = {"encoder": {"text_config": text, "vision_config": _VISION}, "decoder": text}
    source = f"Gemma 3's dimensions at {size.upper()}, which encoder and decoder both have"
    return dimensions(config, f"google/t5gemma-2-{size}-{size}", source)
