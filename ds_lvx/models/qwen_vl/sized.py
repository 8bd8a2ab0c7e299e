"""Qwen-VL in numbers: what a comparison has to know of a checkpoint, and images to measure with.

The model's code comes with its checkpoints, so there are no models of random weights here. All
layers of the text see images.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ds_lvx.models.qwen_vl.batch import QUERIES, queries_of, side_of
from ds_lvx.models.random_weights import random_pixels, random_text, refuse_none
from ds_lvx.models.size import Size
from ds_lvx.models.visual import COUNTS, PIXELS


def config_of(size: Size) -> Any:
    """The fields of a configuration that are asked for here; no model is built from it."""
    fields: Any = PreTrainedConfig  # which takes any
    visual = {"image_size": size.image_size, "image_start_id": size.vocabulary - 3}
    return fields(vocab_size=size.vocabulary, visual=visual)


def size_of(config: Any) -> Size:
    """The size of a configuration.

    Raises:
        NotImplementedError: there is none, or an image has other rows.
    """
    refuse_none(config, "Qwen-VL")
    if queries_of(config) != QUERIES:
        raise NotImplementedError(
            f"got a Qwen-VL with {queries_of(config)} rows an image; expected {QUERIES}, as the "
            "published models have them"
        )
    visual = config.visual
    # `<img>`, `</img>` and the token of places are the last of the vocabulary of a comparison.
    vocabulary = int(visual["image_start_id"]) + 3
    return Size(
        vocabulary=vocabulary,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=config.kv_channels,
        mlp=config.intermediate_size // 2,
        layers=config.num_hidden_layers,
        cross_at=tuple(range(config.num_hidden_layers)),
        positions=config.max_position_embeddings,
        vision_hidden=visual["width"],
        vision_heads=visual["heads"],
        vision_mlp=int(visual["mlp_ratio"] * visual["width"]),
        vision_layers=visual["layers"],
        vision_global_layers=0,
        image_size=visual["image_size"],
        patch_size=visual["patch_size"],
    )


def random_frames(
    config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.random_frames`: images stand in front of the text."""
    start, side = int(config.visual["image_start_id"]), side_of(config)
    image = torch.tensor([start, *[start + 2] * QUERIES, start + 1])
    pixels = random_pixels(frames, (3, side, side), seed=seed)
    text = random_text(text_tokens, first=start, seed=seed, front=image.repeat(total))
    batch = {**text, COUNTS: torch.tensor([len(pixels)])}
    return {**batch, PIXELS: pixels} if len(pixels) else batch
