"""Qwen2-VL with random weights, cut to any size; a tiny one to try out, frames to measure with.

All layers of the text see images. A frame that is measured is Qwen2.5-VL's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import Qwen2VLConfig

from ds_lvx.models.qwen2_5_vl import sized as qwen
from ds_lvx.models.qwen2_vl.processor import Processor
from ds_lvx.models.size import Size

_TINY_VIDEO_PIXELS = 1024
random_frames = qwen.random_frames


def config_of(size: Size, ids: tuple[int, ...] | None = None) -> Qwen2VLConfig:
    """The configuration of a model cut to a size.

    Args:
        size: its dimensions; ``cross_at`` says nothing here.
        ids: see `ds_lvx.models.qwen2_5_vl.sized.config_of`.

    Raises:
        ValueError: the tower's MLP is not a multiple of its width.
    """
    ratio, rest = divmod(size.vision_mlp, size.vision_hidden)
    if rest > 0:
        raise ValueError(
            f"got an MLP of {size.vision_mlp} in a tower of width {size.vision_hidden}; expected "
            "a multiple of the width, which is all that Qwen2-VL's config can say"
        )
    vision = {
        **qwen.vision_settings(size),
        "embed_dim": size.vision_hidden,
        "mlp_ratio": ratio,
        "hidden_size": size.hidden,  # of what comes out
    }
    return Qwen2VLConfig(
        text_config=qwen.rotated_text(size), vision_config=vision, **qwen.token_ids(size, ids)
    )


def size_of(config: Any) -> Size:
    """The size of a configuration; None is Qwen2-VL 7B's, with frames of 448 x 448 pixels."""
    if config is None:
        return replace(qwen.size_of(None), positions=32_768, vision_mlp=5120)
    width = config.vision_config.embed_dim
    mlp = config.vision_config.mlp_ratio * width
    return qwen.size_of(config, vision_hidden=width, vision_mlp=mlp)


def tiny() -> tuple[Qwen2VLConfig, Processor]:
    """A model of about 200,000 parameters, and its processor: pictures have 4 to 16 tokens."""
    size, ids, processor = qwen.tiny_parts(Processor, video_pixels=_TINY_VIDEO_PIXELS)
    return config_of(size, ids), processor
