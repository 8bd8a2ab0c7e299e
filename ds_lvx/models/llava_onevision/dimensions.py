"""LLaVA-OneVision for the planner. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ds_lvx.models.dimensions import Model, among_text, decoder, text_config, tower, tower_config

# As LlavaOnevisionConfig of transformers has it by default.
_VISION = tower_config(26, 1152, 16, 4304, side=384, patch=14)


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`; a frame is a video's."""
    text, vision = config["text_config"], {**_VISION, **config.get("vision_config", {})}
    layers = decoder(text, count=text["num_hidden_layers"])
    side = vision["image_size"] // vision["patch_size"]
    return Model(
        name=name,
        **among_text(layers),
        vocabulary=text["vocab_size"],
        tower=tower(vision),
        tower_tokens=side**2,
        frame_tokens=math.ceil(side / 2) ** 2,
        projector_parameters=(vision["hidden_size"] + layers.hidden) * layers.hidden,
        tower_states=1,
        source=source,
        embeddings=1 if config.get("tie_word_embeddings", False) else 2,
    )


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    return (_known("7b", 28, 3584, 28, 4, 18_944), _known("72b", 80, 8192, 64, 8, 29_568))


def _known(size: str, layers: int, hidden: int, heads: int, *others: int) -> Model:
    kv_heads, mlp = others
    # Qwen2 7B and 72B; transformers' convert_llava_onevision_weights_to_hf.py adds two tokens to
    # their 152,064 and fills up to a multiple of 64.
    text = text_config(layers, hidden, heads, mlp, vocabulary=152_128, num_key_value_heads=kv_heads)
    name = f"llava-hf/llava-onevision-qwen2-{size}-ov-hf"
    return dimensions({"text_config": text}, name, f"config.json of {name}; frames of videos")
