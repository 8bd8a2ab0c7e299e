"""VideoLLaMA 3 for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_lvx.models.concatenated.dimensions import Merged
from ds_lvx.models.dimensions import Model, among_text, decoder, tower, tower_config
from ds_lvx.models.qwen2_5_vl.dimensions import SIDE, published

_MERGE = 2
"""Patches of a video's token by side, which is its processor's to say."""
_VISION = tower_config(27, 1152, 16, 4304, side=SIDE, patch=14)


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`; a frame is a video's, all of whose tokens are
    kept."""
    text, vision = config.get("text_config", config), config["vision_config"]
    layers = decoder(text, count=text["num_hidden_layers"])
    patches = (SIDE // vision["patch_size"]) ** 2
    tied = config.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    return Merged(
        name=name,
        **among_text(layers),
        vocabulary=text["vocab_size"],
        tower=tower(vision),
        tower_tokens=patches,
        frame_tokens=patches // _MERGE**2,
        projector_parameters=(vision["hidden_size"] + layers.hidden) * layers.hidden,
        tower_states=1,
        source=source,
        embeddings=1 if tied else 2,
    )


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name: of Qwen2.5 1.5B and 7B."""
    sizes = {
        # layers, width, heads, heads of keys, MLP, vocabulary
        "2B": (28, 1536, 12, 2, 8960, 151_936),
        "7B": (28, 3584, 28, 4, 18_944, 152_064),
    }
    return tuple(_known(size, *numbers) for size, numbers in sizes.items())


def _known(size: str, *numbers: int) -> Model:
    config = published(*numbers, tied=size == "2B", vision=_VISION)
    name = f"DAMO-NLP-SG/VideoLLaMA3-{size}"
    return dimensions(config, name, f"config.json of {name}; frames of {SIDE} x {SIDE}")
