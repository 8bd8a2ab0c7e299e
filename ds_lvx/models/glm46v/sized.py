"""GLM-4.6V's classes with random weights: GLM-4.1V's, or GLM-4.5V's where a size has experts."""

from __future__ import annotations

from typing import Any

from transformers import Glm46VConfig

from ds_lvx.models.glm4v import sized as dense
from ds_lvx.models.glm4v.processor import Processor, Tenths
from ds_lvx.models.glm4v_moe import sized as mixture
from ds_lvx.models.size import Size

random_frames = dense.random_frames
frame_tokens = dense.frame_tokens


def config_of(size: Size, ids: tuple[int, ...] | None = None) -> Glm46VConfig:
    """The configuration of a model cut to a size: see `ds_lvx.models.glm4v.sized.config_of`, and of
    one with experts `ds_lvx.models.glm4v_moe.sized.config_of`."""
    made: Any = (mixture if size.experts else dense).config_of(size, ids)
    own = {key: getattr(made, key) for key in (*dense.TOKENS, "tie_word_embeddings")}
    return Glm46VConfig(text_config=made.text_config, vision_config=made.vision_config, **own)


def size_of(config: Any) -> Size:
    """The size of a configuration; None is GLM-4.1V 9B's."""
    has_experts = config is not None and hasattr(config.text_config, "moe_intermediate_size")
    return (mixture if has_experts else dense).size_of(config)


def tiny() -> tuple[Glm46VConfig, Processor]:
    """A dense model of about 200,000 parameters, and its processor: pictures have 2 to 8 tokens."""
    size, ids, processor = dense.tiny_parts(Tenths)
    return config_of(size, ids), processor
