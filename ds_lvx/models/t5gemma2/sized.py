"""T5Gemma2 with random weights, cut to any size, and frames to measure with.

A size counts the encoder's layers and the decoder's, which are those that look at images.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration

from ds_lvx.models.random_weights import (
    plain_settings,
    random_pixels,
    refill,
    size_of_known,
    size_of_parts,
    vision_settings,
)
from ds_lvx.models.size import Size
from ds_lvx.models.t5gemma2.batch import image_tokens
from ds_lvx.models.t5gemma2.dimensions import known
from ds_lvx.models.visual import COUNTS, PIXELS

_POOLED = 4
"""Patches of a visual token, by side."""
_WINDOW = 1024
_PROMPT = 16
"""Tokens of text in the encoder's row that is measured."""
_IMAGE, _BEHIND = 256_001, 256_000
"""Ids of an image's tokens and of the one behind them, where the vocabulary has room for them."""
_CLOSED = ("mm_input_projection_weight", "eoi_embedding")
"""Zeros in a new model, as gates are in others."""


def config_of(size: Size) -> T5Gemma2Config:
    """The configuration of a model cut to a size; a small vocabulary ends with an image's tokens.

    Raises:
        ValueError: no layers in encoder or decoder.
    """
    cross = len(size.cross_at)
    if not 0 < cross < size.layers:
        raise ValueError(
            f"got {size.layers - cross} layers of self-attention and {cross} of cross-attention; "
            "expected at least one of each: the encoder's and the decoder's"
        )
    head_dim = size.head_dim or size.hidden // size.heads
    text = {
        **plain_settings(size),
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "sliding_window": _WINDOW,
        "pad_token_id": 0 if size.pad is None else size.pad,
    }
    image, behind = _IMAGE, _BEHIND
    if size.vocabulary <= _IMAGE:
        image, behind = size.vocabulary - 1, size.vocabulary - 2
    side = max(size.image_size // size.patch_size // _POOLED, 1)
    own = {"model_type": "siglip_vision_model", "vision_use_head": False}
    return T5Gemma2Config(
        encoder={
            "text_config": {**text, "num_hidden_layers": size.layers - cross},
            "vision_config": {**vision_settings(size), **own},
            "mm_tokens_per_image": side**2,
            "eoi_token_index": behind,
            "initializer_range": size.initializer_range,
        },
        decoder={**text, "num_hidden_layers": cross},
        image_token_index=image,
        initializer_range=size.initializer_range,
    )


def size_of(config: Any) -> Size:
    """The size of a configuration; None is T5Gemma 2 4B-4B's.

    Raises:
        NotImplementedError: its images have other tokens than the published models'.
    """
    if config is None:
        decoding = tuple(range(34, 68))
        return size_of_known(known(), "-4b", cross_at=decoding, positions=131_072, image_size=896)
    text, vision, decoder = config.encoder.text_config, config.encoder.vision_config, config.decoder
    layers = text.num_hidden_layers + decoder.num_hidden_layers
    cross = tuple(range(text.num_hidden_layers, layers))
    size = size_of_parts(text, vision, head_dim=text.head_dim, layers=layers, cross_at=cross)
    found, expected = _tokens(config), _tokens(config_of(size))
    if found != expected:
        raise NotImplementedError(
            f"got a T5Gemma2 whose images have {found}; expected {expected}, as published models "
            "of its sizes have them: others cannot be cut to a size"
        )
    return size


def _tokens(config: Any) -> dict[str, int]:
    """What the text has to know of an image's tokens."""
    encoder = config.encoder
    return {
        "tokens": image_tokens(config),
        "image_token_index": int(encoder.image_token_id),
        "eoi_token_index": int(encoder.eoi_token_id),
    }


def build(
    config: T5Gemma2Config, *, gate: float, dtype: torch.dtype
) -> T5Gemma2ForConditionalGeneration:
    """Random weights, by torch's generator; ``gate`` times as large where a new model has zeros."""
    model = T5Gemma2ForConditionalGeneration._from_config(config, dtype=dtype)
    refill(model, _CLOSED, partial(nn.init.normal_, std=gate * config.initializer_range))
    return model


def random_frames(
    config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.random_frames`; ``text_tokens`` are the decoder's."""
    generator = torch.Generator().manual_seed(seed)
    tokens = _PROMPT + text_tokens
    image, behind = config.encoder.image_token_id, config.encoder.eoi_token_id
    text = torch.randint(1, behind, (1, tokens), generator=generator)
    text[0, 0] = behind
    visual = torch.full((1, total * image_tokens(config)), image)
    side = config.encoder.vision_config.image_size
    pixels = random_pixels(frames, (3, side, side), seed=seed)
    batch = {
        "input_ids": torch.cat((visual, text[:, :_PROMPT]), dim=1),
        "labels": text[:, _PROMPT:],
        COUNTS: torch.tensor([len(pixels)]),
    }
    return {**batch, PIXELS: pixels} if len(pixels) else batch
