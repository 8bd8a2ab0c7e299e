"""Qwen3-VL-MoE with random weights, cut to any size; a tiny one to try out, frames to measure with.

All layers of the text see images, and each has experts. A frame that is measured is Qwen3-VL's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import Qwen3VLMoeConfig

from ds_lvx.models.qwen2_5_vl.sized import tiny_parts, token_ids
from ds_lvx.models.qwen3_vl import sized as qwen
from ds_lvx.models.qwen3_vl.processor import Processor
from ds_lvx.models.qwen3_vl_moe.dimensions import known
from ds_lvx.models.random_weights import size_of_known
from ds_lvx.models.size import Size

random_frames = qwen.random_frames


def config_of(size: Size, ids: tuple[int, ...] | None = None) -> Qwen3VLMoeConfig:
    """The configuration of a model cut to a size.

    Args:
        size: its dimensions, ``mlp`` an expert's; ``cross_at`` says nothing here.
        ids: see `ds_lvx.models.qwen2_5_vl.sized.config_of`.
    """
    text = {
        **qwen.rotated_text(size),
        "moe_intermediate_size": size.mlp,
        "num_experts": size.experts,
        "num_experts_per_tok": size.chosen_experts,
        "tie_word_embeddings": False,
    }
    return Qwen3VLMoeConfig(
        text_config=text, vision_config=qwen.vision_settings(size), **token_ids(size, ids)
    )


def size_of(config: Any) -> Size:
    """The size of a configuration; None is Qwen3-VL 30B-A3B's, with frames of 768 x 768 pixels.

    Raises:
        NotImplementedError: some layers of the text have no experts.
    """
    if config is None:
        experts = {"mlp": 768, "experts": 128, "chosen_experts": 8}
        return size_of_known(known(), "-30B-A3B", **qwen.MEASURED, rope_theta=5e6, **experts)
    text = config.text_config
    if text.mlp_only_layers or text.decoder_sparse_step != 1:
        raise NotImplementedError(
            f"got a text model with mlp_only_layers {text.mlp_only_layers} and decoder_sparse_step "
            f"{text.decoder_sparse_step}; expected experts in every layer, as the published models "
            "have them: a model with random weights is made of layers that are alike"
        )
    return replace(
        qwen.size_of(config),
        mlp=text.moe_intermediate_size,
        experts=text.num_experts,
        chosen_experts=text.num_experts_per_tok,
    )


def tiny() -> tuple[Qwen3VLMoeConfig, Processor]:
    """A model of about 200,000 parameters, and its processor: pictures have 4 to 16 tokens."""
    size, ids, processor = tiny_parts(Processor, video_pixels=qwen.TINY_VIDEO_PIXELS)
    return config_of(replace(size, mlp=24, experts=4, chosen_experts=2), ids), processor
