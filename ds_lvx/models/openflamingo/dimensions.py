"""OpenFlamingo for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_lvx.models.dimensions import Layers, Model, decoder, text_config, tower, tower_config

_HEADS = 8


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`; the perceiver is left out."""
    text, vision = _text(config["text_config"]), config["vision_config"]
    hidden, width = text.hidden, vision["hidden_size"]
    return Model(
        name=name,
        text=text,
        cross=Layers(
            text.count // config["cross_attn_every_n_layers"],
            hidden,
            _HEADS,
            _HEADS,
            config["dim_head"],
            4 * hidden,
            mlp_matrices=2,
            features_dim=width,
        ),
        vocabulary=config["text_config"]["vocab_size"],
        tower=tower(vision),
        tower_tokens=(vision["image_size"] // vision["patch_size"]) ** 2 + 1,
        frame_tokens=config["latents"],
        projector_parameters=0,
        tower_states=1,
        source=source,
    )


def _text(config: Mapping[str, Any]) -> Layers:
    """The language model's layers: an MPT's config has words of its own."""
    if config["model_type"] == "llama":
        return decoder(config, count=config["num_hidden_layers"])
    if config["model_type"] == "mpt":
        count, hidden, heads = (config[key] for key in ("n_layers", "d_model", "n_heads"))
        mlp = config["expansion_ratio"] * hidden
    else:
        count, hidden = config["num_hidden_layers"], config["hidden_size"]
        heads, mlp = config["num_attention_heads"], config["intermediate_size"]
    return Layers(count, hidden, heads, heads, hidden // heads, mlp, mlp_matrices=2)


def _known(name: str, *, hidden: int, layers: int, heads: int, every: int) -> Model:
    # An MPT's layers are as large.
    own = {"model_type": "gpt_neox"}
    text = text_config(layers, hidden, heads, 4 * hidden, vocabulary=50_432, **own)
    vision = tower_config(24, 1024, 16, 4096, side=224, patch=14)
    sizes = {"cross_attn_every_n_layers": every, "dim_head": 64, "latents": 64}
    return dimensions(
        {"text_config": text, "vision_config": vision, **sizes},
        f"openflamingo/{name}",
        "open_flamingo/src/helpers.py and the model card (ViT-L/14 at 224 pixels, 64 latents a "
        "frame); the perceiver is left out",
    )


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    return (
        _known("OpenFlamingo-3B-vitl-mpt1b", hidden=2048, layers=24, heads=16, every=1),
        _known("OpenFlamingo-4B-vitl-rpj3b", hidden=2560, layers=32, heads=32, every=2),
        _known("OpenFlamingo-9B-vitl-mpt7b", hidden=4096, layers=32, heads=32, every=4),
    )
