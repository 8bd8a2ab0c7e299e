"""InternVL with random weights, on a Qwen2, cut to any size; frames to measure with.

All layers of the text see images. A frame that is measured is a tile.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import InternVLConfig

from ds_lvx.models.byte_tokenizer import byte_tokenizer
from ds_lvx.models.internvl.batch import tile_tokens
from ds_lvx.models.internvl.dimensions import known
from ds_lvx.models.internvl.processor import END, IMAGE_TOKEN, START, Processor
from ds_lvx.models.random_weights import (
    of_heads,
    random_pixels,
    random_text,
    size_of_known,
    size_of_parts,
    text_settings,
    tiny_size,
    vision_settings,
)
from ds_lvx.models.size import Size
from ds_lvx.models.visual import PIXELS

_OTHERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TINY_SIDE = 16
_IMAGE = 151_667
"""The token of an image, where a vocabulary has room."""


def config_of(size: Size, image: int | None = None) -> InternVLConfig:
    """The configuration of a model cut to a size.

    Args:
        size: its dimensions; ``cross_at`` says nothing here.
        image: the token of an image; None: the published models', or where the vocabulary is small
            its last.
    """
    text = {"model_type": "qwen2", "tie_word_embeddings": False, **text_settings(size)}
    own = {"attention_bias": True, "initializer_range": size.initializer_range}
    return InternVLConfig(
        text_config=text,
        vision_config={**vision_settings(size), **own},
        image_token_id=min(_IMAGE, size.vocabulary - 1) if image is None else image,
        image_seq_length=(size.image_size // size.patch_size // 2) ** 2,
        tie_word_embeddings=False,
    )


def size_of(config: Any) -> Size:
    """The size of a configuration; None is InternVL3 8B's."""
    if config is None:
        return size_of_known(
            known(), "InternVL3-8B", positions=32_768, rope_theta=1e6, image_size=448
        )
    vision = config.vision_config
    text, sides = config.text_config, {"image_size": vision.image_size[0]}
    sides["patch_size"] = vision.patch_size[0]
    return size_of_parts(text, vision, **of_heads(text), **sides)


def tiny() -> tuple[InternVLConfig, Processor]:
    """A model of about 200,000 parameters, and its processor: a tile has 4 tokens."""
    tokenizer = byte_tokenizer(
        (*_OTHERS, START, END, IMAGE_TOKEN), eos_token=_OTHERS[2], pad_token=_OTHERS[0]
    )
    sides = {"height": _TINY_SIDE, "width": _TINY_SIDE}
    files: dict[str, dict[str, Any]] = {
        "preprocessor_config.json": {"size": sides, "max_patches": 4},
        "processor_config.json": {"image_seq_length": 4},
    }
    size = tiny_size(tokenizer, image_size=_TINY_SIDE, patch_size=_TINY_SIDE // 4)
    image = int(tokenizer.get_vocab()[IMAGE_TOKEN])
    config = config_of(size, image)
    return config, Processor(tokenizer, files, config)


def random_frames(
    config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.random_frames`: frames stand in front of the text."""
    image, vision = int(config.image_token_id), config.vision_config
    tiles = torch.full((total * tile_tokens(config),), image)
    batch = random_text(text_tokens, first=image, seed=seed, front=tiles)
    shape = (vision.num_channels, *vision.image_size)
    pixels = random_pixels(frames, shape, seed=seed, apart=(1,))
    return {**batch, PIXELS: pixels} if len(pixels) else batch
