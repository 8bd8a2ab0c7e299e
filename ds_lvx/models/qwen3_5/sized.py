"""Qwen3.5 with random weights, cut to any size; a tiny one to try out, frames to measure with.

Every fourth layer of the text attends, and its last does; the others carry a state. A frame that is
measured is Qwen3-VL's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import Qwen3_5Config

from ds_lvx.models.qwen2_5_vl.sized import tiny_parts, token_ids
from ds_lvx.models.qwen3_5.dimensions import known
from ds_lvx.models.qwen3_vl import sized as qwen
from ds_lvx.models.qwen3_vl.processor import Processor
from ds_lvx.models.random_weights import size_of_known, text_settings
from ds_lvx.models.size import Size

_EVERY = 4
_ROTATED = 4
"""Of a head's numbers one in so many turns with the position."""
frame_tokens = qwen.frame_tokens
random_frames = qwen.random_frames


def config_of(size: Size, ids: tuple[int, ...] | None = None) -> Qwen3_5Config:
    """The configuration of a model cut to a size.

    Args:
        size: its dimensions; ``cross_at`` says nothing here.
        ids: see `ds_lvx.models.qwen2_5_vl.sized.config_of`.
    """
    vision = vision_settings(size)
    return Qwen3_5Config(text_config=text_of(size), vision_config=vision, **token_ids(size, ids))


def vision_settings(size: Size) -> dict[str, Any]:
    """A tower's configuration."""
    vision = qwen.vision_settings(size)
    del vision["deepstack_visual_indexes"]
    return vision


def text_of(size: Size) -> dict[str, Any]:
    """Of the text's configuration, what a size says."""
    text = text_settings(size)
    turning = text["head_dim"] // _ROTATED // 2
    of_width = turning * 10 // 32
    of_height = (turning - of_width) // 2
    text["rope_parameters"] |= {
        "partial_rotary_factor": 1 / _ROTATED,
        "mrope_section": [turning - of_width - of_height, of_height, of_width],
        "mrope_interleaved": True,
    }
    last = size.layers - 1
    return {
        **text,
        "layer_types": [
            "full_attention" if n % _EVERY == _EVERY - 1 or n == last else "linear_attention"
            for n in range(size.layers)
        ],
        "linear_num_key_heads": size.state_heads,
        "linear_num_value_heads": size.state_values,
        "linear_key_head_dim": size.state_dim,
        "linear_value_head_dim": size.state_dim,
    }


def size_of(config: Any) -> Size:
    """The size of a configuration; None is Qwen3.5 9B's, with frames of 768 x 768 pixels."""
    if config is None:
        return size_of_known(known(), "-9B", **qwen.MEASURED, rope_theta=1e7)
    text = config.text_config
    return replace(
        qwen.size_of(config),
        state_heads=text.linear_num_key_heads,
        state_values=text.linear_num_value_heads,
        state_dim=text.linear_key_head_dim,
    )


def tiny() -> tuple[Qwen3_5Config, Processor]:
    """A model of about 200,000 parameters, and its processor: pictures have 4 to 16 tokens."""
    size, ids, processor = tiny_parts(Processor, video_pixels=qwen.TINY_VIDEO_PIXELS)
    return config_of(tiny_size(size), ids), processor


def tiny_size(size: Size) -> Size:
    """That of a tiny model whose text carries a state along."""
    return replace(size, head_dim=32, state_heads=4, state_values=8, state_dim=8)
