"""InternVL for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_lvx.models.concatenated.dimensions import Merged
from ds_lvx.models.dimensions import Model, among_text, decoder, text_config, tower, tower_config

_VISION = tower_config(24, 1024, 16, 4096, side=448, patch=14)
_LARGE = {
    "num_hidden_layers": 45,
    "hidden_size": 3200,
    "num_attention_heads": 25,
    "intermediate_size": 12_800,
}
"""InternViT of 0.3 and of 6 billion weights."""


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`; a frame is a tile."""
    text, vision = config["text_config"], {**_VISION, **config.get("vision_config", {})}
    layers = decoder(text, count=text["num_hidden_layers"])
    width, merge = vision["hidden_size"], round(1 / config.get("downsample_ratio", 0.5))
    patches = (_side(vision["image_size"]) // _side(vision["patch_size"])) ** 2
    return Merged(
        name=name,
        **among_text(layers),
        vocabulary=text["vocab_size"],
        tower=tower(vision),
        tower_tokens=patches + 1,
        frame_tokens=patches // merge**2,
        projector_parameters=(width * merge**2 + layers.hidden) * layers.hidden,
        tower_states=1,
        source=source,
        embeddings=1 if config.get("tie_word_embeddings", True) else 2,
    )


def _side(size: Any) -> int:
    return int(size if isinstance(size, int) else size[0])


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name: of Qwen2.5 7B, 14B, 32B and 72B.

    8B and 78B as MindSpeed-MM's examples/internvl3 have them, the large tower as
    InternViT-6B-448px-V1-5 has it, the small one and the merger as transformers has by default.
    """
    sizes = {
        # layers, width, heads, heads of keys, MLP
        "8B": (28, 3584, 28, 4, 18_944),
        "14B": (48, 5120, 40, 8, 13_824),
        "38B": (64, 5120, 40, 8, 27_648),
        "78B": (80, 8192, 64, 8, 29_568),
    }
    return tuple(_known(size, *numbers) for size, numbers in sizes.items())


def _known(size: str, layers: int, hidden: int, heads: int, *others: int) -> Model:
    kv_heads, mlp = others
    config = {
        "text_config": text_config(
            layers, hidden, heads, mlp, vocabulary=151_674, num_key_value_heads=kv_heads
        ),
        "vision_config": _LARGE if size in ("38B", "78B") else {},
        "tie_word_embeddings": False,
    }
    name = f"OpenGVLab/InternVL3-{size}-hf"
    return dimensions(config, name, f"config.json of {name}; a frame is a tile")
