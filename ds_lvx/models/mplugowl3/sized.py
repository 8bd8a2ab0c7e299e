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
from ds_lvx.models.random_weights import (
    plain_settings,
    random_pixels,
    random_text,
    refuse_none,
    size_of_parts,
    vision_settings,
)
from ds_lvx.models.size import Size
from ds_lvx.models.visual import COUNTS, PIXELS


def config_of(size: Size) -> Any:
    """The fields of a configuration that are asked for here; no model is built from it."""
    fields: Any = PreTrainedConfig  # which takes any
    return fields(
        **plain_settings(size),
        hyper_layers=[number + 1 for number in size.cross_at],
        vision_config=fields(**vision_settings(size)),
    )


def size_of(config: Any) -> Size:
    """The size of a configuration.

    Raises:
        NotImplementedError: there is none.
    """
    refuse_none(config, "mPLUG-Owl3")
    cross = tuple(number - 1 for number in config.hyper_layers)
    return size_of_parts(config, config.vision_config, cross_at=cross)


def random_frames(
    config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.random_frames`; all images stand at the first token."""
    side = config.vision_config.image_size
    pixels = random_pixels(frames, (3, side, side), seed=seed)
    batch = {
        **random_text(text_tokens, first=config.vocab_size, seed=seed),
        OFFSETS: torch.zeros(1, total, dtype=torch.int64),
        COUNTS: torch.tensor([len(pixels)]),
    }
    return {**batch, PIXELS: pixels} if len(pixels) else batch
