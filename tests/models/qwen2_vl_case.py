"""A tiny Qwen2-VL, and batches for it: Qwen2.5-VL's without seconds."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tests.models import qwen2_5_vl_case as qwen

Batch = dict[str, Any]


def tiny_model(**text: Any) -> Any:
    """Three layers of text, two of vision; always the same weights."""
    vision = {
        "depth": 2,
        "embed_dim": 16,
        "mlp_ratio": 2,
        "num_heads": 2,
        "patch_size": qwen.PATCH,
        "spatial_merge_size": qwen.MERGE,
        "temporal_patch_size": 2,
        "hidden_size": 32,
    }
    config = Qwen2VLConfig(text_config={**qwen.TEXT, **text}, vision_config=vision, **qwen.IDS)
    return qwen.weighted(Qwen2VLForConditionalGeneration, config)


def lora_model() -> Any:
    return qwen.with_adapters(tiny_model())


def frozen_tower() -> Any:
    return qwen.without_tower(tiny_model())


def without_seconds(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key != "second_per_grid_ts"}


def make_batch(*args: Any, **keywords: Any) -> Batch:
    return without_seconds(qwen.make_batch(*args, **keywords))


def hard_batch(seed: int = 0) -> Batch:
    return without_seconds(qwen.hard_batch(seed))


def left_padded(seed: int = 1) -> Batch:
    return without_seconds(qwen.left_padded(seed))


def one_image(seed: int = 2) -> Batch:
    return without_seconds(qwen.one_image(seed))


def one_video(seed: int = 5) -> Batch:
    return without_seconds(qwen.one_video(seed))


def text_only(seed: int = 4) -> Batch:
    return qwen.text_only(seed)


BATCHES = (hard_batch, left_padded, one_image, one_video, text_only)
