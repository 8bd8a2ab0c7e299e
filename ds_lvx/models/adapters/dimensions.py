"""BLIP-2, InstructBLIP and InstructBLIP-Video for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ds_lvx.models.dimensions import (
    Layers,
    Model,
    among_text,
    decoder,
    text_config,
    tower,
    tower_config,
)

_VISION = tower_config(39, 1408, 16, 6144, side=224, patch=14)
_QFORMER = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "cross_attention_frequency": 2,
}
"""Of the published models."""


@dataclass(frozen=True)
class Adapted(Model):
    """A model whose projector, an adapter, takes few queries through most of its weights.

    Attributes:
        adapter_tokens: of a frame, that all its weights would have to work on for as much work.
    """

    adapter_tokens: int = 0

    @property
    def projector_tokens(self) -> int:
        """See `ds_lvx.models.dimensions.Model.projector_tokens`."""
        return self.adapter_tokens


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`.

    Raises:
        ValueError: the language model has an encoder.
    """
    text, vision = _text(config["text_config"], name), {**_VISION, **config["vision_config"]}
    width, places = vision["hidden_size"], config.get("num_query_tokens", 32)
    patches = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    of_queries, of_patches = _qformer({**_QFORMER, **config["qformer_config"]}, width)
    of_queries += config["qformer_config"].get("hidden_size", _QFORMER["hidden_size"]) * text.hidden
    work = of_queries * places + of_patches * patches
    return Adapted(
        name=name,
        **among_text(text),
        vocabulary=config["text_config"]["vocab_size"],
        tower=tower(vision),
        tower_tokens=patches,
        frame_tokens=places,
        projector_parameters=of_queries + of_patches,
        tower_states=1,
        source=source,
        embeddings=1 if config["text_config"].get("model_type") == "opt" else 2,
        gathered=True,
        adapter_tokens=work // (of_queries + of_patches),
    )


def _text(config: Mapping[str, Any], name: str) -> Layers:
    kind = config.get("model_type")
    if kind == "llama":
        return decoder(config, count=config["num_hidden_layers"])
    if kind == "opt":
        layers = decoder(
            {**config, "intermediate_size": config["ffn_dim"]}, count=config["num_hidden_layers"]
        )
        return replace(layers, mlp_matrices=2)
    raise ValueError(
        f"model: got {name} on a {kind!r}; expected an opt or a llama: a language model with an "
        "encoder runs whole on every rank, and nothing of it is split"
    )


def _qformer(config: Mapping[str, Any], width: int) -> tuple[int, int]:
    """Weights that queries go through, and those that make keys and values of patches."""
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    crossing = -(-layers // config["cross_attention_frequency"])
    own = layers * (4 * hidden**2 + 2 * hidden * config["intermediate_size"])
    return own + crossing * 2 * hidden**2, crossing * 2 * width * hidden


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    return (
        _known("blip2-opt-2.7b", "opt", layers=32, hidden=2560, heads=32, mlp=10_240),
        _known("blip2-opt-6.7b", "opt", layers=32, hidden=4096, heads=32, mlp=16_384),
        _known("instructblip-vicuna-7b", "llama", layers=32, hidden=4096, heads=32, mlp=11_008),
        _known("instructblip-vicuna-13b", "llama", layers=40, hidden=5120, heads=40, mlp=13_824),
    )


def _known(name: str, kind: str, *, layers: int, hidden: int, heads: int, mlp: int) -> Model:
    vocabulary, own = (50_304 if kind == "opt" else 32_001), {"model_type": kind, "ffn_dim": mlp}
    text = text_config(layers, hidden, heads, mlp, vocabulary=vocabulary, **own)
    config = {"text_config": text, "vision_config": {}, "qformer_config": {}}
    return dimensions(config, f"Salesforce/{name}", f"config.json of Salesforce/{name}")
