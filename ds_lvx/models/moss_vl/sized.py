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
    text = fields(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        intermediate_size=size.mlp,
        cross_attention_layers=list(size.cross_at),
        max_position_embeddings=size.positions,
    )
    return fields(vision_config=vision, text_config=text, image_token_id=size.vocabulary)


def size_of(config: Any) -> Size:
    """The size of a configuration.

    Raises:
        NotImplementedError: there is none.
    """
    if config is None:
        raise NotImplementedError(
            "got no configuration of MOSS-VL, whose code comes with its checkpoints; pass the "
            "folder of one"
        )
    text, vision = config.text_config, config.vision_config
    multiple = vision.patch_size * vision.spatial_merge_size
    return Size(
        vocabulary=min(text.vocab_size, config.image_token_id),
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        mlp=text.intermediate_size,
        layers=text.num_hidden_layers,
        cross_at=tuple(text.cross_attention_layers),
        positions=text.max_position_embeddings,
        vision_hidden=vision.hidden_size,
        vision_heads=vision.num_heads,
        vision_mlp=vision.intermediate_size,
        vision_layers=vision.depth,
        vision_global_layers=0,
        image_size=max(IMAGE_SIZE * vision.patch_size // 16 // multiple, 1) * multiple,
        patch_size=vision.patch_size,
    )


def tokens_of(side: int, vision: Any) -> int:
    """Visual tokens of a square frame, its separator among them."""
    return int((side // (vision.patch_size * vision.spatial_merge_size)) ** 2 + 1)


def random_frames(
    config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.random_frames`."""
    vision, mine = config.vision_config, list(frames)
    generator = torch.Generator().manual_seed(seed)
    highest = min(config.text_config.vocab_size, config.image_token_id)
    tokens = torch.randint(1, highest, (1, text_tokens), generator=generator)
    text = {
        "input_ids": tokens,
        "labels": tokens,
        SEEN: torch.full((1, text_tokens), total),
    }
    if not mine:
        return text
    side = vision.image_size // vision.patch_size
    width = vision.in_channels * vision.patch_size**2
    pixels = torch.empty(len(mine), side**2, width)
    for place, frame in enumerate(mine):
        generator.manual_seed(seed + 1 + frame)
        # Brighter or darker than others, so that a method which lost some would show.
        shift = torch.randn(1, generator=generator)
        pixels[place] = shift + torch.randn(pixels.shape[1:], generator=generator)
    return {
        **text,
        PIXELS: pixels.flatten(0, 1),
        "grid_thw": torch.tensor([[len(mine), side, side]]),
        "media_nums_per_sample": torch.tensor([1]),
    }
