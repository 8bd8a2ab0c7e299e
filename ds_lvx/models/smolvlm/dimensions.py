"""SmolVLM and Idefics3 for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_lvx.models.concatenated.dimensions import Merged
from ds_lvx.models.dimensions import Model, among_text, decoder, tower, tower_config

_VISION = tower_config(12, 1152, 16, 3072, side=224, patch=32)
"""What transformers has by default; a ``config.json`` says what is otherwise."""


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`; a frame is a tile."""
    text, vision = config["text_config"], {**_VISION, **config.get("vision_config", {})}
    layers = decoder(text, count=text["num_hidden_layers"])
    merge = config.get("scale_factor", 2)
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    return Merged(
        name=name,
        **among_text(layers),
        vocabulary=text["vocab_size"],
        tower=tower(vision),
        tower_tokens=patches,
        frame_tokens=patches // merge**2,
        projector_parameters=vision["hidden_size"] * merge**2 * layers.hidden,
        tower_states=1,
        source=source,
        embeddings=1 if config.get("tie_word_embeddings", False) else 2,
    )


def known() -> tuple[Model, ...]:
    """None by name: the planner reads a ``config.json``."""
    return ()
