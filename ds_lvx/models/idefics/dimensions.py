"""idefics (v1) for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ds_lvx.models.dimensions import Model, decoder, encoder, text_config

_IDEFICS_VISION = {
    "embed_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "intermediate_size": 5120,
    "image_size": 224,
    "patch_size": 14,
}


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`."""
    vision = config["vision_config"]
    text = decoder(config, count=config["num_hidden_layers"])
    count = -(-text.count // config["cross_layer_interval"])
    patches = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    latents = config.get("perceiver_config", {}).get("resampler_n_latents", 64)
    return Model(
        name=name,
        text=text,
        cross=replace(text, count=count, features_dim=vision["embed_dim"]),
        vocabulary=config["vocab_size"],
        tower=encoder(
            vision["num_hidden_layers"],
            vision["embed_dim"],
            heads=vision["num_attention_heads"],
            mlp=vision["intermediate_size"],
        ),
        tower_tokens=patches,
        frame_tokens=latents if config.get("use_resampler") else patches,
        projector_parameters=0,
        tower_states=1,
        source=source,
    )


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    own = {"cross_layer_interval": 4, "use_resampler": True, "vision_config": _IDEFICS_VISION}
    return (
        dimensions(
            text_config(32, 4096, 32, 11_008, vocabulary=32_000, **own),
            "HuggingFaceM4/idefics-9b",
            "config.json of HuggingFaceM4/idefics-9b; the perceiver is left out",
        ),
    )
