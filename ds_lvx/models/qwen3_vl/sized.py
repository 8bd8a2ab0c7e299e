"""Qwen3-VL with random weights, cut to any size; a tiny one to try out, frames to measure with.

All layers of the text see images. A frame that is measured is a unit of a video: the square for
which the tower has a learned position for each patch.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLConfig

from ds_lvx.models.qwen2_5_vl import sized as qwen
from ds_lvx.models.qwen3_vl.dimensions import known
from ds_lvx.models.qwen3_vl.processor import Processor
from ds_lvx.models.random_weights import of_heads, size_of_known, size_of_parts, text_settings
from ds_lvx.models.size import Size

_DEPTH, _DEEP = 27, (8, 16, 24)
"""Layers of the published tower, and those whose features the text adds."""
MEASURED = {"positions": 262_144, "image_size": 768, "patch_size": 16}
"""Of a published model, of which frames of 768 x 768 pixels are measured."""
TINY_VIDEO_PIXELS = 65_536


def config_of(size: Size, ids: tuple[int, ...] | None = None) -> Qwen3VLConfig:
    """The configuration of a model cut to a size.

    Args:
        size: its dimensions; ``cross_at`` says nothing here.
        ids: see `ds_lvx.models.qwen2_5_vl.sized.config_of`.
    """
    return Qwen3VLConfig(
        text_config=rotated_text(size),
        vision_config=vision_settings(size),
        **qwen.token_ids(size, ids),
    )


def rotated_text(size: Size) -> dict[str, Any]:
    """Of the text's configuration, what a size says: the axes of its positions take turns."""
    head = size.head_dim or size.hidden // size.heads
    of_a_side = 5 * head // 32
    text = text_settings(size)
    text["rope_parameters"] |= {
        "mrope_section": [head // 2 - 2 * of_a_side, of_a_side, of_a_side],
        "mrope_interleaved": True,
    }
    return text


def vision_settings(size: Size) -> dict[str, Any]:
    """A tower's configuration."""
    deep = dict.fromkeys(size.vision_layers * layer // _DEPTH for layer in _DEEP)
    # Behind the last layer of the text nobody sees what is added to a visual token.
    deep_layers = [*deep][: max(size.layers - 1, 0)]
    return {
        **qwen.vision_settings(size),
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_mlp,
        "num_position_embeddings": (size.image_size // size.patch_size) ** 2,
        "deepstack_visual_indexes": deep_layers,
        "out_hidden_size": size.hidden,
    }


def size_of(config: Any) -> Size:
    """The size of a configuration; None is Qwen3-VL 8B's, with frames of 768 x 768 pixels."""
    if config is None:
        return size_of_known(known(), "-8B", **MEASURED, rope_theta=5e6)
    text, vision = config.text_config, config.vision_config
    side = _side(config) * vision.patch_size
    return size_of_parts(text, vision, **of_heads(text), image_size=side)


def tiny() -> tuple[Qwen3VLConfig, Processor]:
    """A model of about 200,000 parameters, and its processor: pictures have 4 to 16 tokens."""
    size, ids, processor = qwen.tiny_parts(Processor, video_pixels=TINY_VIDEO_PIXELS)
    return config_of(size, ids), processor


def frame_tokens(config: Any) -> int:
    """Visual tokens of a unit of `random_frames`."""
    return (_side(config) // int(config.vision_config.spatial_merge_size)) ** 2


def random_frames(
    config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.random_frames`: a frame is a unit of a video in front,
    with its start and its end."""
    ends = torch.tensor([[config.vision_start_token_id], [config.vision_end_token_id]])
    visual = torch.full((total, frame_tokens(config)), config.video_token_id)
    each = (ends[:1].expand(total, 1), visual, ends[1:].expand(total, 1))
    front, side = torch.cat(each, 1).flatten(), _side(config)
    first = int(config.vision_start_token_id)
    return qwen.random_video(
        config, front, text_tokens, first=first, total=total, side=side, frames=frames, seed=seed
    )


def _side(config: Any) -> int:
    """Patches of a frame that is measured, by side."""
    return isqrt(config.vision_config.num_position_embeddings)
