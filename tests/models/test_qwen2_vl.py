"""Qwen2-VL: positions and sizes; more is in test_concatenated.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ds_lvx.compare.case import cut, random_case
from ds_lvx.models.registry import FAMILIES
from ds_lvx.sharding import shard_batch
from tests.models.compare_case import compared
from tests.models.qwen2_vl_case import one_video, tiny_model

NAME = "qwen2_vl"


def test_frames_of_a_video_are_a_place_apart() -> None:
    """Qwen2.5-VL's are as far apart as their seconds say; there are none here."""
    shard = shard_batch(one_video(), model=tiny_model())
    time, height, width = shard["position_ids"][:, 0]
    assert time[1 : 1 + 28].tolist() == [1 + n for n in range(7) for _ in range(4)]
    assert height[1 : 1 + 28].tolist() == [1, 1, 2, 2] * 7
    assert width[1 : 1 + 28].tolist() == [1, 2, 1, 2] * 7
    words = "got 'second_per_grid_ts' in the batch"
    with pytest.raises(ValueError, match=words):
        shard_batch({**one_video(), "second_per_grid_ts": [1.0]}, model=tiny_model())


def test_a_comparison_trains_a_model_of_random_weights() -> None:
    given = cut(random_case(NAME), hidden=256, cross_layers=2, vision_layers=2)
    assert (given.heads, given.kv_heads, given.frame_tokens) == (2, 2, 256)
    sizes = {"vision_hidden": 32, "vision_heads": 2, "vision_mlp": 64, "patch_size": 2}
    given = replace(given, **sizes, vocabulary=96, text_tokens=8, mlp=64)
    model, _ = compared(given, frames=1, method="ring")
    assert all(parameter.grad.any() for _, parameter in model.named_parameters())


def test_a_checkpoint_has_a_size() -> None:
    family = FAMILIES.named(NAME)
    published = family.config(family.size())
    assert family.size(published) == family.size()
    assert (published.vision_config.mlp_ratio, published.video_token_id) == (4, 151_656)
    with pytest.raises(ValueError, match=r"MLP of 33 in a tower of width 16"):
        family.config(replace(family.size(), vision_hidden=16, vision_mlp=33))
    config = family.tiny()[0]
    model = family.build(config, gate=1.0, dtype=torch.float32)
    counted = family.dimensions(config.to_dict(), "tiny", "config.json").parameters
    assert counted == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    layers = {each.name: each.features_dim for each in family.attention_layers(model)}
    assert layers["model.visual.blocks.0.attn"] == config.vision_config.embed_dim
