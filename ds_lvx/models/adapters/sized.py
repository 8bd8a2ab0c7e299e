"""BLIP-2 and its like with random weights, cut to any size, and images to measure with.

All layers of the text see images. BLIP-2 is on an OPT, the others on a Llama.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, OPTConfig

from ds_lvx.models.adapters.dimensions import known
from ds_lvx.models.random_weights import (
    random_pixels,
    random_text,
    refill,
    size_of_known,
    size_of_parts,
    vision_settings,
)
from ds_lvx.models.size import Size
from ds_lvx.models.visual import COUNTS, PIXELS

PLACES = 32
"""Rows of an image, in every published model."""
_POSITIONS = 2048
"""Of the published models."""


def config_of(size: Size, of_config: Any, *, token: str, on_opt: bool) -> Any:
    """The configuration of a model cut to a size.

    Args:
        size: its dimensions; ``cross_at`` says nothing here.
        of_config: its class.
        token: the field of the image token, which is the last of the vocabulary.
        on_opt: the language model is an OPT, else a Llama.

    Raises:
        ValueError: an OPT whose heads share keys.
    """
    if on_opt and size.kv_heads != size.heads:
        raise ValueError(
            f"got {size.heads} heads and {size.kv_heads} of keys; expected as many, as OPT has them"
        )
    words: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        # An OPT has a table of them, and images take some beside the text.
        "max_position_embeddings": max(size.positions, _POSITIONS),
        "bos_token_id": size.bos,
        "eos_token_id": size.eos,
        "pad_token_id": size.pad,
    }
    text: Any = (
        OPTConfig(**words, ffn_dim=size.mlp, word_embed_proj_dim=size.hidden, dropout=0.0)
        if on_opt
        else LlamaConfig(**words, intermediate_size=size.mlp, num_key_value_heads=size.kv_heads)
    )
    vision = {**vision_settings(size), "initializer_range": size.initializer_range}
    # Dropout is each rank's own, and there would be nothing to compare.
    qformer = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return of_config(
        text_config=text,
        vision_config=vision,
        qformer_config=qformer,
        num_query_tokens=PLACES,
        **{token: size.vocabulary - 1},
    )


def size_of(config: Any, *, on_opt: bool) -> Size:
    """The size of a configuration; None is that of the smallest published model.

    Args:
        config: of the model.
        on_opt: the family's published models are on an OPT.

    Raises:
        NotImplementedError: its text runs whole on every rank, or an image has other places.
    """
    if config is None:
        name, vocabulary = ("blip2-opt-2.7b", 50_304) if on_opt else ("vicuna-7b", 32_002)
        beside = {"head_dim": 0, "positions": _POSITIONS, "image_size": 224}
        return size_of_known(known(), name, vocabulary=vocabulary, **beside)
    text, vision = config.text_config, config.vision_config
    if text.is_encoder_decoder or config.num_query_tokens != PLACES:
        raise NotImplementedError(
            f"got a language model of type {text.model_type!r} and {config.num_query_tokens} rows "
            f"an image; expected one without an encoder, whose text is split, and {PLACES} rows"
        )
    return size_of_parts(text, vision)


def build(of_class: Any, config: Any, *, dtype: torch.dtype) -> Any:
    """Random weights, by torch's generator, those of the queries too; there are no gates."""
    model = of_class._from_config(config, dtype=dtype)
    refill(model, "query_tokens", nn.init.normal_)
    return model


def random_frames(
    config: Any,
    image: int,
    *,
    reads: Iterable[str],
    text_tokens: int,
    total: int,
    frames: Iterable[int],
    seed: int,
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.random_frames`: images stand in front of the text.

    Args:
        config: of the model.
        image: the image token.
        reads: what the Q-Former reads beside pixels, a token here.
        text_tokens, total, frames, seed: as there.

    Raises:
        ValueError: more tokens than the model has positions.
    """
    length, most = total * PLACES + text_tokens, config.text_config.max_position_embeddings
    if length > most:
        raise ValueError(
            f"got {total} frames of {PLACES} places each and {text_tokens} text tokens; expected "
            f"at most {most} tokens together, the positions of the model: take fewer frames"
        )
    side = config.vision_config.image_size
    pixels = random_pixels(frames, (3, side, side), seed=seed)
    front = torch.full((total * PLACES,), image)
    batch = {
        **random_text(text_tokens, first=image, seed=seed, front=front),
        COUNTS: torch.tensor([len(pixels)]),
        **{key: torch.ones(1, 1, dtype=torch.int64) for key in reads},
    }
    return {**batch, PIXELS: pixels} if len(pixels) else batch
