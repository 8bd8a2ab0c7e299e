"""Qwen3.5 with experts and random weights, cut to any size; a tiny one to try out.

Layers are as Qwen3.5's, and so is a frame to measure with; the expert that serves every token is as
wide as the others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import Qwen3_5MoeConfig

from ds_lvx.models.qwen2_5_vl.sized import tiny_parts, token_ids
from ds_lvx.models.qwen3_5 import sized as qwen
from ds_lvx.models.qwen3_5_moe.dimensions import known
from ds_lvx.models.qwen3_vl.processor import Processor
from ds_lvx.models.qwen3_vl.sized import MEASURED, TINY_VIDEO_PIXELS
from ds_lvx.models.random_weights import size_of_known
from ds_lvx.models.size import Size

frame_tokens = qwen.frame_tokens
random_frames = qwen.random_frames
_SHARED = "shared_expert_intermediate_size"


def config_of(size: Size, ids: tuple[int, ...] | None = None) -> Qwen3_5MoeConfig:
    """The configuration of a model cut to a size.

    Args:
        size: its dimensions, ``mlp`` an expert's; ``cross_at`` says nothing here.
        ids: see `ds_lvx.models.qwen2_5_vl.sized.config_of`.
    """
    text = {
        **qwen.text_of(size),
        "moe_intermediate_size": size.mlp,
        _SHARED: size.mlp,
        "num_experts": size.experts,
        "num_experts_per_tok": size.chosen_experts,
    }
    vision = qwen.vision_settings(size)
    return Qwen3_5MoeConfig(text_config=text, vision_config=vision, **token_ids(size, ids))


def size_of(config: Any) -> Size:
    """The size of a configuration; None is Qwen3.5 35B-A3B's, with frames of 768 x 768 pixels.

    Raises:
        NotImplementedError: the expert that serves every token is another than the others.
    """
    if config is None:
        experts = {"mlp": 512, "experts": 256, "chosen_experts": 8}
        return size_of_known(known(), "-35B-A3B", **MEASURED, rope_theta=1e7, **experts)
    text = config.text_config
    if text.shared_expert_intermediate_size != text.moe_intermediate_size:
        raise NotImplementedError(
            f"got a text model with {_SHARED} {text.shared_expert_intermediate_size} and "
            f"moe_intermediate_size {text.moe_intermediate_size}; expected as much, as the "
            "published models have it: a model with random weights is made of experts that are "
            "alike"
        )
    return replace(
        qwen.size_of(config),
        mlp=text.moe_intermediate_size,
        experts=text.num_experts,
        chosen_experts=text.num_experts_per_tok,
    )


def tiny() -> tuple[Qwen3_5MoeConfig, Processor]:
    """A model of about 200,000 parameters, and its processor: pictures have 4 to 16 tokens."""
    size, ids, processor = tiny_parts(Processor, video_pixels=TINY_VIDEO_PIXELS)
    size = replace(qwen.tiny_size(size), mlp=24, experts=4, chosen_experts=2)
    return config_of(size, ids), processor
