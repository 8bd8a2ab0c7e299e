"""OpenFlamingo with random weights, cut to any size, and frames to measure with.

A gated layer stands before every n-th layer of the text. A size counts both kinds: of 48 layers of
the published model of 4 billion weights 16 are gated.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, GPTNeoXConfig, LlamaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ds_lvx.models.byte_tokenizer import byte_tokenizer
from ds_lvx.models.openflamingo.batch import PIXELS
from ds_lvx.models.openflamingo.dimensions import known
from ds_lvx.models.openflamingo.model import Flamingo, FlamingoConfig
from ds_lvx.models.openflamingo.processor import END_TOKEN, IMAGE_TOKEN, Processor
from ds_lvx.models.random_weights import (
    plain_settings,
    random_pixels,
    random_text,
    refill,
    size_of_known,
    size_of_parts,
    tiny_size,
    vision_settings,
)
from ds_lvx.models.size import Size

_PERCEIVER = {"latents": 64, "depth": 6, "dim_head": 64}
"""Of the published models."""
_EOS, _PAD = "<|endoftext|>", "<PAD>"
_TINY_SIDE = 28


def config_of(size: Size, *, latest: bool = False, **others: Any) -> FlamingoConfig:
    """The configuration of a model cut to a size: on a GPT-NeoX, or on a Llama that shares keys.

    Args:
        size: its dimensions.
        latest: text sees the latest image alone; else all before it.
        others: further fields.

    Raises:
        ValueError: the layers of the text are no multiple of the gated ones.
    """
    gated = len(size.cross_at)
    layers = size.layers - gated
    if gated == 0 or layers < gated or layers % gated:
        raise ValueError(
            f"got {layers} layers of self-attention and {gated} of cross-attention; expected a "
            "cross-attention layer before every n-th of the others, as OpenFlamingo has them"
        )
    text = {**plain_settings(size), "num_hidden_layers": layers}
    kv_heads = text.pop("num_key_value_heads")
    shares = size.kv_heads != size.heads
    given = {
        "media_token_id": size.vocabulary - 1,
        "eoc_token_id": size.eos,
        **_PERCEIVER,
        **others,
    }
    return FlamingoConfig(
        LlamaConfig(**text, num_key_value_heads=kv_heads) if shares else GPTNeoXConfig(**text),
        CLIPVisionConfig(**vision_settings(size)),
        cross_attn_every_n_layers=layers // gated,
        only_attend_immediate_media=latest,
        **given,
    )


def size_of(config: Any) -> Size:
    """The size of a configuration; None is OpenFlamingo-4B-vitl-rpj3b's.

    Raises:
        NotImplementedError: its perceiver is not the published models'.
    """
    if config is None:
        return size_of_known(
            known(),
            "-4B",
            vocabulary=50_280,
            cross_at=_gated(16, every=2),
            head_dim=0,
            positions=2048,
            image_size=224,
        )
    found = {key: getattr(config, key) for key in _PERCEIVER}
    if found != _PERCEIVER:
        raise NotImplementedError(
            f"got an OpenFlamingo with a perceiver of {found}; expected that of the published "
            f"models, {_PERCEIVER}: others cannot be cut to a size"
        )
    text, vision, every = config.text_config, config.vision_config, config.cross_attn_every_n_layers
    gated = text.num_hidden_layers // every
    return size_of_parts(
        text,
        vision,
        mlp=getattr(text, "intermediate_size", None) or text.expansion_ratio * text.hidden_size,
        layers=text.num_hidden_layers + gated,
        cross_at=_gated(gated, every=every),
    )


def _gated(count: int, *, every: int) -> tuple[int, ...]:
    return tuple(number * (every + 1) + every - 1 for number in range(count))


def build(config: FlamingoConfig, *, gate: float, dtype: torch.dtype) -> Flamingo:
    """Random weights, by torch's generator, and the gates of the gated layers at ``gate``."""
    model: Flamingo = Flamingo._from_config(config, dtype=dtype)
    refill(model, "_gate", partial(nn.init.constant_, val=gate))
    return model


def tiny() -> tuple[FlamingoConfig, Processor]:
    """A model of about 250,000 weights, whose text sees the latest image, and its processor."""
    tokenizer = byte_tokenizer((_EOS, _PAD, END_TOKEN, IMAGE_TOKEN), eos_token=_EOS, pad_token=_PAD)
    side = {"height": _TINY_SIDE, "width": _TINY_SIDE}
    images = CLIPImageProcessorPil(size={"shortest_edge": _TINY_SIDE}, crop_size=side)
    size = tiny_size(tokenizer, kv_heads=4, layers=6, cross_at=(1, 4), image_size=_TINY_SIDE)
    config = config_of(
        size,
        latest=True,
        eoc_token_id=tokenizer.get_vocab()[END_TOKEN],
        latents=4,
        depth=1,
        dim_head=8,
    )
    return config, Processor(tokenizer, images)


def random_frames(
    config: FlamingoConfig, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.random_frames`: image tokens stand before the text, each
    of which sees the images up to its own."""
    image, side = int(config.media_token_id), config.vision_config.image_size
    front = torch.full((total,), image)
    pixels = random_pixels(frames, (3, side, side), seed=seed)[None, :, None]
    return {**random_text(text_tokens, first=image, seed=seed, front=front), PIXELS: pixels}
