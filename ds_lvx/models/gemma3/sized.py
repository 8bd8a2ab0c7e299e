"""Gemma 3 with random weights, cut to any size; images to measure with.

All layers of the text see images, the last of six all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from ds_lvx.models.byte_tokenizer import byte_tokenizer
from ds_lvx.models.gemma3.batch import TYPES, image_tokens
from ds_lvx.models.gemma3.dimensions import known
from ds_lvx.models.gemma3.processor import END, IMAGE_TOKEN, START, Processor
from ds_lvx.models.random_weights import (
    random_pixels,
    random_text,
    refill,
    size_of_known,
    size_of_parts,
    text_settings,
    tiny_size,
    vision_settings,
)
from ds_lvx.models.size import Size
from ds_lvx.models.visual import PIXELS

_OTHERS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
_TINY_SIDE = 16
_POOLED = 4
"""Patches of a visual token, by side."""
_WINDOW = 1024
_LOCAL_THETA = 1e4
_IMAGE = 262_144
"""The token of an image, where a vocabulary has room."""
_CLOSED = "mm_input_projection_weight"
"""Zeros in a new model, as gates are in others."""


def config_of(size: Size, image: int | None = None, **text: Any) -> Gemma3Config:
    """The configuration of a model cut to a size.

    Args:
        size: its dimensions; ``cross_at`` says nothing here.
        image: the token of an image; None: the published models', or where the vocabulary is small
            its last. Those that begin and end one are before it.
        text: further entries of the text's.
    """
    settings = text_settings(size)
    rope = settings["rope_parameters"]
    settings |= {
        "query_pre_attn_scalar": settings["head_dim"],
        "sliding_window": _WINDOW,
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {**rope, "rope_theta": _LOCAL_THETA},
        },
        **text,
    }
    image = min(_IMAGE, size.vocabulary - 1) if image is None else image
    return Gemma3Config(
        text_config=settings,
        vision_config={**vision_settings(size), "vision_use_head": False},
        mm_tokens_per_image=max(size.image_size // size.patch_size // _POOLED, 1) ** 2,
        boi_token_index=image - 2,
        eoi_token_index=image - 1,
        image_token_index=image,
        initializer_range=size.initializer_range,
    )


def size_of(config: Any) -> Size:
    """The size of a configuration; None is Gemma 3 4B's.

    Raises:
        NotImplementedError: its images have other tokens than the published models'.
    """
    if config is None:
        return size_of_known(known(), "-4b", positions=131_072, rope_theta=1e6, image_size=896)
    text = config.text_config
    theta = text.rope_parameters["full_attention"]["rope_theta"]
    size = size_of_parts(text, config.vision_config, head_dim=text.head_dim, rope_theta=theta)
    found, expected = image_tokens(config), image_tokens(config_of(size))
    if found != expected:
        raise NotImplementedError(
            f"got a Gemma 3 whose images have {found} tokens; expected {expected}, as published "
            "models of its sizes have them: others cannot be cut to a size"
        )
    return size


def build(config: Any, *, gate: float, dtype: torch.dtype) -> Gemma3ForConditionalGeneration:
    """Random weights, by torch's generator; ``gate`` times as large where a new model has zeros."""
    model = Gemma3ForConditionalGeneration._from_config(config, dtype=dtype)
    refill(model, _CLOSED, partial(nn.init.normal_, std=gate * config.initializer_range))
    return model


def tiny() -> tuple[Gemma3Config, Processor]:
    """A model of about 200,000 parameters, and its processor: an image has 4 tokens."""
    tokenizer = byte_tokenizer(
        (*_OTHERS, START, END, IMAGE_TOKEN),
        bos_token=_OTHERS[2],
        eos_token=_OTHERS[4],
        pad_token=_OTHERS[0],
    )
    sides = {"height": _TINY_SIDE, "width": _TINY_SIDE}
    files: dict[str, dict[str, Any]] = {
        "preprocessor_config.json": {"size": sides},
        "processor_config.json": {"image_seq_length": 4},
    }
    size = tiny_size(
        tokenizer,
        layers=6,
        image_size=_TINY_SIDE,
        patch_size=_TINY_SIDE // 2 // _POOLED,
        bos=int(tokenizer.bos_token_id),
    )
    image = int(tokenizer.get_vocab()[IMAGE_TOKEN])
    config = config_of(size, image, sliding_window=64)
    return config, Processor(tokenizer, files, config)


def random_frames(
    config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.random_frames`: frames stand in front of the text, a token
    between them."""
    each, image = image_tokens(config), int(config.image_token_id)
    one = torch.cat((torch.full((1,), image - 2), torch.full((each,), image)))
    batch = random_text(text_tokens, first=image - 2, seed=seed, front=one.repeat(total))
    side = config.vision_config.image_size
    pixels = random_pixels(frames, (3, side, side), seed=seed)
    batch[TYPES] = (batch["input_ids"] == image).long()
    return {**batch, PIXELS: pixels} if len(pixels) else batch
