"""Qwen-VL for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ds_lvx.models.dimensions import Layers, Model, encoder
from ds_lvx.models.qwen2_5_vl.dimensions import Merged


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`; a frame is an image of the text."""
    visual, hidden = config["visual"], config["hidden_size"]
    heads, size = config["num_attention_heads"], config["kv_channels"]
    # What the config calls its MLP's width is that of two matrices, one of them the gate's.
    mlp = config["intermediate_size"] // 2
    text = Layers(config["num_hidden_layers"], hidden, heads, heads, size, mlp, features_dim=hidden)
    width, out = visual["width"], visual["output_dim"]
    return Merged(
        name=name,
        text=replace(text, count=0),
        cross=text,
        vocabulary=config["vocab_size"],
        tower=encoder(
            visual["layers"],
            width,
            heads=visual["heads"],
            mlp=int(visual["mlp_ratio"] * width),
        ),
        tower_tokens=(visual["image_size"] // visual["patch_size"]) ** 2,
        frame_tokens=visual.get("n_queries", 256),
        projector_parameters=width * out + 5 * out**2,
        tower_states=1,
        source=source,
        recomputes=False,
        among=True,
        gathered=True,
    )


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    config = {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "kv_channels": 128,
        "intermediate_size": 22_016,
        "vocab_size": 151_936,
        "visual": {
            "layers": 48,
            "width": 1664,
            "heads": 16,
            "mlp_ratio": 4.9231,
            "output_dim": 4096,
            "image_size": 448,
            "patch_size": 14,
        },
    }
    return (dimensions(config, "Qwen/Qwen-VL", "config.json of Qwen/Qwen-VL; a frame is an image"),)
