"""A tiny GLM-4.5V; its batches are GLM-4.1V's."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
)

from tests.models import qwen2_5_vl_case as qwen
from tests.models.glm4v_case import (
    BATCHES,
    IDS,
    TEXT,
    VISION,
    for_one_process,
    generate,
    hard_batch,
    left_padded,
    make_batch,
    mixed,
    one_image,
    one_video,
    text_only,
)

__all__ = (
    "BATCHES",
    "for_one_process",
    "frozen_tower",
    "generate",
    "hard_batch",
    "left_padded",
    "lora_model",
    "make_batch",
    "mixed",
    "one_image",
    "one_video",
    "text_only",
    "tiny_46",
    "tiny_model",
)
BIAS = "e_score_correction_bias"


def tiny_model(**text: Any) -> Any:
    """As GLM-4.1V's, with wider heads; behind the first layer of the text a token goes through one
    expert and two of six, of one of two groups; always the same weights."""
    settings = {
        **TEXT,
        "head_dim": 24,
        "rope_parameters": {**TEXT["rope_parameters"], "mrope_section": [2, 2, 2]},
        "moe_intermediate_size": 16,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
    }
    config = Glm4vMoeConfig(text_config={**settings, **text}, vision_config=VISION, **IDS)
    model = qwen.weighted(Glm4vMoeForConditionalGeneration, config)
    generator = torch.Generator().manual_seed(7)
    for name, buffer in model.named_buffers():
        if name.endswith(BIAS):  # else it chooses nobody
            buffer.normal_(std=0.1, generator=generator)
    return model


def tiny_46(**text: Any) -> Any:
    """The same by GLM-4.6V's classes."""
    model = tiny_model(**text)
    parts = {"text_config": model.config.text_config, "vision_config": model.config.vision_config}
    made = Glm46VForConditionalGeneration(Glm46VConfig(**parts, **IDS))
    made.load_state_dict(model.state_dict())
    return made


def lora_model() -> Any:
    return qwen.with_adapters(tiny_model())


def frozen_tower() -> Any:
    return qwen.without_tower(tiny_model())
