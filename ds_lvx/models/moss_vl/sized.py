"""MOSS-VL in numbers: what a comparison has to know of a checkpoint, and frames to measure with.

The model's code comes with its checkpoints, so there are no models of random weights here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ds_lvx.models.moss_vl.batch import PIXELS, SEEN
from ds_lvx.models.random_weights import (
    plain_settings,
    random_pixels,
    random_text,
    refuse_none,
    size_of_parts,
)
from ds_lvx.models.size import Size

IMAGE_SIZE = 864
"""Pixels by side of a frame, where none says more: about those of 256 frames of a film."""


def config_of(size: Size) -> Any:
    """The fields of a configuration that are asked for here; no model is built from it."""
    fields: Any = PreTrainedConfig  # which takes any
    vision = fields(
        depth=size.vision_layers,
        hidden_size=size.vision_hidden,
        intermediate_size=size.vision_mlp,
        num_heads=size.vision_heads,
        in_channels=3,
        patch_size=size.patch_size,
        spatial_merge_size=2,
        out_hidden_size=size.hidden,
        image_size=size.image_size,
    )
    text = fields(**plain_settings(size), cross_attention_layers=list(size.cross_at))
    return fields(vision_config=vision, text_config=text, image_token_id=size.vocabulary)


def size_of(config: Any) -> Size:
    """The size of a configuration.

    Raises:
        NotImplementedError: there is none.
    """
    refuse_none(config, "MOSS-VL")
    text, vision = config.text_config, config.vision_config
    multiple = vision.patch_size * vision.spatial_merge_size
    side = max(IMAGE_SIZE * vision.patch_size // 16 // multiple, 1) * multiple
    return size_of_parts(
        text,
        vision,
        vocabulary=min(text.vocab_size, config.image_token_id),
        cross_at=tuple(text.cross_attention_layers),
        image_size=side,
    )


def tokens_of(side: int, vision: Any) -> int:
    """Visual tokens of a square frame, its separator among them."""
    return int((side // (vision.patch_size * vision.spatial_merge_size)) ** 2 + 1)


def random_frames(
    config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.random_frames`."""
    vision = config.vision_config
    highest = min(config.text_config.vocab_size, config.image_token_id)
    text = random_text(text_tokens, first=highest, seed=seed)
    text[SEEN] = torch.full((1, text_tokens), total)
    side = vision.image_size // vision.patch_size
    width = vision.in_channels * vision.patch_size**2
    pixels = random_pixels(frames, (side**2, width), seed=seed, apart=(1,))
    if not len(pixels):
        return text
    return {
        **text,
        PIXELS: pixels.flatten(0, 1),
        "grid_thw": torch.tensor([[len(pixels), side, side]]),
        "media_nums_per_sample": torch.tensor([1]),
    }
