"""A tiny Qwen3-VL-MoE; its batches are Qwen3-VL's."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from tests.models import qwen2_5_vl_case as qwen
from tests.models.qwen3_vl_case import (
    BATCHES,
    VISION,
    hard_batch,
    left_padded,
    make_batch,
    one_image,
    one_video,
    text_only,
)

__all__ = (
    "BATCHES",
    "frozen_tower",
    "hard_batch",
    "left_padded",
    "lora_model",
    "make_batch",
    "one_image",
    "one_video",
    "text_only",
    "tiny_model",
)


def tiny_model(**text: Any) -> Any:
    """As Qwen3-VL's, but a token goes through two of four experts in the first and last of the
    text's layers; always the same weights."""
    settings = {
        **qwen.TEXT,
        "head_dim": 12,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
        "tie_word_embeddings": False,
    }
    config = Qwen3VLMoeConfig(text_config={**settings, **text}, vision_config=VISION, **qwen.IDS)
    return qwen.weighted(Qwen3VLMoeForConditionalGeneration, config)


def lora_model() -> Any:
    return qwen.with_adapters(tiny_model())


def frozen_tower() -> Any:
    return qwen.without_tower(tiny_model())
