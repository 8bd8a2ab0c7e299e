"""A tiny Qwen3.5; its batches are Qwen3-VL's."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from tests.models import qwen2_5_vl_case as qwen
from tests.models import qwen3_vl_case
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
VISION = {k: v for k, v in qwen3_vl_case.VISION.items() if k != "deepstack_visual_indexes"}
TEXT: dict[str, Any] = {
    **qwen.TEXT,
    "head_dim": 32,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
    "rms_norm_eps": 1e-2,  # of what a state gives little is left to be normalised
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
LAYERS = ("linear_attention", "full_attention", "linear_attention")


def tiny_model(**text: Any) -> Qwen3_5ForConditionalGeneration:
    """Three layers of text, of which the first and last carry a state, and for long; always the
    same weights."""
    return with_states(Qwen3_5ForConditionalGeneration, Qwen3_5Config, text)


def with_states(kind: Any, config: Any, text: dict[str, Any]) -> Any:
    """A model of a class, of a configuration of ``TEXT`` with some entries changed."""
    settings = {**TEXT, **text}
    settings["layer_types"] = [*LAYERS[: settings["num_hidden_layers"]]]
    model = qwen.weighted(kind, config(text_config=settings, vision_config=VISION, **qwen.IDS))
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data = torch.linspace(0.02, 0.5, len(parameter)).log()
        if name.endswith("conv1d.weight"):
            parameter.data *= 5  # keys are normalised: small ones would lose digits
    return model


def lora_model() -> Any:
    """`tiny_model` inside peft's wrapper: adapters of the text's attention train."""
    return qwen.with_adapters(tiny_model())


def frozen_tower() -> Any:
    return qwen.without_tower(tiny_model())
