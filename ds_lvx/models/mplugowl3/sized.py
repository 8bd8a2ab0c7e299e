"""mPLUG-Owl3 in numbers: what a comparison has to know of a checkpoint, and images to measure with.

The model's code comes with its checkpoints, so there are no models of random weights here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ds_lvx.models.mplugowl3.batch import OFFSETS
from ds_lvx.models.size import Size
from ds_lvx.models.visual import COUNTS, PIXELS


def config_of(size: Size) -> Any:
    """The fields of a configuration that are asked for here; no model is built from it."""
    fields: Any = PreTrainedConfig  # which takes any
    vision = fields(
        hidden_size=size.vision_hidden,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        intermediate_size=size.vision_mlp,
        image_size=size.image_size,
        patch_size=size.patch_size,
    )
    return fields(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        intermediate_size=size.mlp,
        max_position_embeddings=size.positions,
        hyper_layers=[number + 1 for number in size.cross_at],
        vision_config=vision,
    )


def size_of(config: Any) -> Size:
    """The size of a configuration.

    Raises:
        NotImplementedError: there is none.
    """
    if config is None:
        raise NotImplementedError(
            "got no configuration of mPLUG-Owl3, whose code comes with its checkpoints; pass the "
            "folder of one"
        )
    vision = config.vision_config
    return Size(
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        mlp=config.intermediate_size,
        layers=config.num_hidden_layers,
        cross_at=tuple(number - 1 for number in config.hyper_layers),
        positions=config.max_position_embeddings,
        vision_hidden=vision.hidden_size,
        vision_heads=vision.num_attention_heads,
        vision_mlp=vision.intermediate_size,
        vision_layers=vision.num_hidden_layers,
        vision_global_layers=0,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
    )


def random_frames(
    config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.random_frames`; all images stand at the first token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, config.vocab_size, (1, text_tokens), generator=generator)
    side, mine = config.vision_config.image_size, list(frames)
    batch = {
        "input_ids": tokens,
        "labels": tokens,
        OFFSETS: torch.zeros(1, total, dtype=torch.int64),
        COUNTS: torch.tensor([len(mine)]),
    }
    if not mine:
        return batch
    pixels = torch.empty(len(mine), 3, side, side)
    for place, frame in enumerate(mine):
        generator.manual_seed(seed + 1 + frame)
        # Brighter or darker than others, so that a method which lost some would show.
        shift = torch.randn(3, 1, 1, generator=generator)
        pixels[place] = shift + torch.randn(pixels.shape[1:], generator=generator)
    return {**batch, PIXELS: pixels}
