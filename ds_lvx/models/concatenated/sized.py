"""What these families' models with random weights have in common; frames to measure with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ds_lvx.models.size import Size


def text_settings(size: Size) -> dict[str, Any]:
    """Of a text model's configuration, what a size says; ``head_dim`` is resolved."""
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim or size.hidden // size.heads,
        "max_position_embeddings": size.positions,
        "initializer_range": size.initializer_range,
        "rope_parameters": {"rope_type": "default", "rope_theta": size.rope_theta},
        "bos_token_id": size.bos,
        "eos_token_id": size.eos,
        "pad_token_id": size.pad,
    }


def size_of(config: Any, *, image_size: int, patch_size: int) -> Size:
    """The size of a configuration whose text's layers all see images.

    Args:
        config: of the model.
        image_size, patch_size: of a frame that is measured, by side.
    """
    text, vision = config.text_config, config.vision_config
    heads, deep = text.num_attention_heads, hasattr(vision, "depth")
    return Size(
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        mlp=text.intermediate_size,
        layers=text.num_hidden_layers,
        cross_at=tuple(range(text.num_hidden_layers)),
        positions=text.max_position_embeddings,
        rope_theta=text.rope_parameters["rope_theta"],
        vision_hidden=vision.hidden_size,
        vision_heads=vision.num_heads if deep else vision.num_attention_heads,
        vision_mlp=vision.intermediate_size,
        vision_layers=vision.depth if deep else vision.num_hidden_layers,
        vision_global_layers=0,
        image_size=image_size,
        patch_size=patch_size,
    )


def random_text(front: Tensor, text_tokens: int, *, first: int, seed: int) -> dict[str, Tensor]:
    """Ids and labels of random text behind the tokens in front.

    Args:
        front: int64 ``[n]``.
        text_tokens: behind them.
        first: special token; all below are words.
        seed: of the words.
    """
    words = torch.randint(1, first, (text_tokens,), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat((front, words))[None]
    return {"input_ids": ids, "labels": ids.masked_fill(ids >= first, -100)}


def random_pixels(frames: Iterable[int], shape: tuple[int, ...], *, seed: int) -> Tensor | None:
    """float32 ``[frames, *shape]``, each by its number and the seed; None where there are none."""
    made = []
    for frame in frames:
        generator = torch.Generator().manual_seed(seed + 1 + frame)
        # Brighter or darker than others, so that a method which lost some would show.
        shift = torch.randn(1, generator=generator)
        made.append(shift + torch.randn(shape, generator=generator))
    return torch.stack(made) if made else None
