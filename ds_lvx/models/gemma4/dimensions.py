"""Gemma 4 for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ds_lvx.models.concatenated.dimensions import Merged
from ds_lvx.models.dimensions import Model, decoder, tower
from ds_lvx.models.qwen3_vl_moe.dimensions import mixture

_EVERY = 6
"""Of so many layers of a published model one sees everything."""
_TEXT = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "vocab_size": 262_144,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 0,
}
_VISION = {
    "num_hidden_layers": 16,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 16,
    "pooling_kernel_size": 3,
}
"""What transformers takes where a config does not say it."""
_FRAME = 64
"""Tokens of a frame of a square video: of 70 at most, those of 8 x 8."""


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`.

    Heads of the layers that see everything are others than those of the layers with a window: each
    layer counts as the mean of all, and so does its MLP where some are twice as wide. Values that
    are keys count as keys of their own.
    """
    text, vision = {**_TEXT, **config["text_config"]}, {**_VISION, **config["vision_config"]}
    count, types = text["num_hidden_layers"], text.get("layer_types")
    full = count // _EVERY if types is None else types.count("full_attention")
    shared, hidden = text["num_kv_shared_layers"], text["hidden_size"]
    heads = text["num_attention_heads"]
    size = ((count - full) * text["head_dim"] + full * text["global_head_dim"]) / count
    local = text["num_key_value_heads"]
    everywhere = text.get("num_global_key_value_heads") or local
    if not text.get("attention_k_eq_v"):
        everywhere = local
    keys = (count - full) * local * text["head_dim"] + full * everywhere * text["global_head_dim"]
    wide = shared if text.get("use_double_wide_mlp") else 0
    layers = replace(
        decoder(text, count=count),
        head_dim=round(size),
        kv_heads=max(round(keys / count / size), 1),
        mlp=text["intermediate_size"] * (count + wide) // count,
    )
    own = text["hidden_size_per_layer_input"] or 0
    pooled = vision["pooling_kernel_size"] ** 2
    found: Model = Merged(
        name=name,
        text=replace(layers, count=0),
        cross=replace(layers, features_dim=hidden),
        vocabulary=text["vocab_size"],
        tower=replace(tower(vision), mlp_matrices=3),
        tower_tokens=_FRAME * pooled,
        frame_tokens=_FRAME,
        projector_parameters=vision["hidden_size"] * hidden + own * count * hidden,
        tower_states=1,
        source=source,
        embeddings=1,
        recomputes=False,
        among=True,
        windowed=count - full,
        window=text["sliding_window"],
    )
    assert heads == layers.heads
    if not text.get("enable_moe_block"):
        return found
    return mixture(
        found,
        text["moe_intermediate_size"],
        experts=text["num_experts"],
        chosen=text["top_k_experts"],
        sparse=count,
        shared=text["intermediate_size"],
    )


def known() -> tuple[Model, ...]:
    """None by name: the planner reads a ``config.json``."""
    return ()
