"""A tiny Qwen3.5 with experts; its batches are Qwen3-VL's."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from tests.models import qwen2_5_vl_case as qwen
from tests.models.qwen3_5_case import with_states
from tests.models.qwen3_vl_case import (
    BATCHES,
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
    """As Qwen3.5's, but a token goes through one expert and two of four others; always the same
    weights."""
    experts = {
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    return with_states(Qwen3_5MoeForConditionalGeneration, Qwen3_5MoeConfig, {**experts, **text})


def lora_model() -> Any:
    return qwen.with_adapters(tiny_model())


def frozen_tower() -> Any:
    return qwen.without_tower(tiny_model())
