"""Gemma 4 for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ds_lvx.models.concatenated.dimensions import Merged
from ds_lvx.models.dimensions import Model, among_text, decoder, tower
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
_LARGE_VISION = {
    "num_hidden_layers": 27,
    "hidden_size": 1152,
    "num_attention_heads": 16,
    "intermediate_size": 4304,
}
_EXPERTS = {
    "enable_moe_block": True,
    "moe_intermediate_size": 704,
    "num_experts": 128,
    "top_k_experts": 8,
}
_FRAME = 64
"""Tokens of a frame of a square video: of 70 at most, those of 8 x 8."""


@dataclass(frozen=True)
class OfLayers(Merged):
    """A model with one more table of the vocabulary, of what each layer adds to a token.

    Attributes:
        own: its width, of all layers; 0: there is none.
    """

    own: int = 0

    @property
    def parameters(self) -> int:
        """See `ds_lvx.models.dimensions.Model.parameters`."""
        return super().parameters + self.vocabulary * self.own

    @property
    def largest_layer(self) -> int:
        """See `ds_lvx.models.dimensions.Model.largest_layer`."""
        return max(super().largest_layer, self.vocabulary * self.own)

    @property
    def largest_weight(self) -> int:
        """See `ds_lvx.models.dimensions.Model.largest_weight`."""
        return max(super().largest_weight, self.vocabulary * self.own)


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`.

    Heads of the layers that see everything are larger than those of the layers with a window, and
    the MLPs of some layers wider: each layer counts as the mean of all, with the window's number of
    heads of keys, as if it had keys and values of its own.
    """
    text, vision = {**_TEXT, **config["text_config"]}, {**_VISION, **config["vision_config"]}
    count, types = text["num_hidden_layers"], text.get("layer_types")
    full = count // _EVERY if types is None else types.count("full_attention")
    # As the published config.json says it, or as transformers writes it.
    others = [each["head_dim"] for each in text.get("per_layer_config", {}).values()]
    widest = max(others, default=text["global_head_dim"])
    hidden, each = text["hidden_size"], text["hidden_size_per_layer_input"] or 0
    wide = text["num_kv_shared_layers"] if text.get("use_double_wide_mlp") else 0
    layers = replace(
        decoder(text, count=count),
        head_dim=((count - full) * text["head_dim"] + full * widest) // count,
        mlp=text["intermediate_size"] * (count + wide) // count,
    )
    found: Model = OfLayers(
        name=name,
        **among_text(layers),
        vocabulary=text["vocab_size"],
        tower=replace(tower(vision), mlp_matrices=3),
        tower_tokens=_FRAME * vision["pooling_kernel_size"] ** 2,
        frame_tokens=_FRAME,
        # And what makes a layer's part of a token, and adds it.
        projector_parameters=hidden * (vision["hidden_size"] + 3 * each * count),
        tower_states=1,
        source=source,
        embeddings=1,
        windowed=count - full,
        window=text["sliding_window"],
        own=each * count,
    )
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
    """The models that the planner knows by name."""
    small = {"sliding_window": 512, "head_dim": 256}
    large = {"sliding_window": 1024, "head_dim": 256, "hidden_size_per_layer_input": 0}
    sizes = {
        # layers, of how many one sees everything, width, heads, heads of keys, MLP; others
        "E2B": (35, 5, 1536, 8, 1, 6144, {**small, "use_double_wide_mlp": True}),
        "E4B": (42, 6, 2560, 8, 2, 10_240, small),
        "26B-A4B": (30, 6, 2816, 16, 8, 2112, {**large, **_EXPERTS}),
        "31B": (60, 6, 5376, 32, 16, 21_504, large),
    }
    return tuple(_known(size, *numbers) for size, numbers in sizes.items())


def _known(size: str, layers: int, every: int, hidden: int, *others: Any) -> Model:
    heads, kv_heads, mlp, more = others
    text = {
        "num_hidden_layers": layers,
        "layer_types": [*["sliding_attention"] * (every - 1), "full_attention"] * (layers // every),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "num_kv_shared_layers": {"E2B": 20, "E4B": 18}.get(size, 0),
        **more,
    }
    name = f"google/gemma-4-{size}-it"
    vision = {} if size.startswith("E") else _LARGE_VISION
    source = f"published sizes of {name}; frames of {_FRAME} tokens"
    return dimensions({"text_config": text, "vision_config": vision}, name, source)
