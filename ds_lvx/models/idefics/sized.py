"""idefics with random weights, cut to any size, and frames to measure with.

A gated layer stands before every n-th layer of the text. A size counts both kinds: of 40 layers of
the published model 8 are gated.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from ds_lvx.models.idefics.batch import PIXELS, SEEN
from ds_lvx.models.idefics.dimensions import known
from ds_lvx.models.random_weights import (
    random_pixels,
    random_text,
    refill,
    size_of_known,
    size_of_parts,
)
from ds_lvx.models.size import Size

_PERCEIVER = {
    "use_resampler": True,
    "resampler_n_latents": 64,
    "resampler_depth": 6,
    "resampler_n_heads": 16,
    "resampler_head_dim": 96,
}
"""Of the published models."""


def config_of(size: Size) -> IdeficsConfig:
    """The configuration of a model cut to a size.

    Raises:
        ValueError: the layers of the text are no multiple of the gated ones, or share keys.
    """
    gated = len(size.cross_at)
    layers = size.layers - gated
    if gated == 0 or layers < gated or layers % gated or size.kv_heads != size.heads:
        raise ValueError(
            f"got {layers} layers of self-attention, {gated} of cross-attention, {size.heads} "
            f"heads and {size.kv_heads} of keys; expected a cross-attention layer before every "
            "n-th of the others, and as many heads of keys as of queries, as idefics has them"
        )
    vision = {
        "embed_dim": size.vision_hidden,
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": size.vision_heads,
        "intermediate_size": size.vision_mlp,
        "image_size": size.image_size,
        "patch_size": size.patch_size,
    }
    return IdeficsConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=layers,
        num_attention_heads=size.heads,
        cross_layer_interval=layers // gated,
        qk_layer_norms=True,
        freeze_text_layers=False,
        freeze_vision_layers=False,
        use_resampler=True,
        max_position_embeddings=size.positions,
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
        initializer_range=size.initializer_range,
        bos_token_id=size.bos,
        eos_token_id=size.eos,
        pad_token_id=size.pad,
        vision_config=vision,
        perceiver_config=_PERCEIVER,
    )


def size_of(config: Any) -> Size:
    """The size of a configuration; None is idefics-9b's.

    Raises:
        NotImplementedError: its resampler is not the published models', or it has none.
    """
    if config is None:
        gated = tuple(range(0, 40, 5))
        return size_of_known(
            known(), "-9b", cross_at=gated, head_dim=0, positions=2048, image_size=224
        )
    found = {key: getattr(config.perceiver_config, key) for key in list(_PERCEIVER)[1:]}
    if not config.use_resampler or any(_PERCEIVER[key] != found[key] for key in found):
        raise NotImplementedError(
            f"got an idefics with use_resampler {config.use_resampler} and {found}; expected the "
            f"resampler of the published models, {_PERCEIVER}: others cannot be cut to a size"
        )
    interval = config.cross_layer_interval
    gated = config.num_hidden_layers // interval
    return size_of_parts(
        config,
        config.vision_config,
        kv_heads=config.num_attention_heads,
        layers=config.num_hidden_layers + gated,
        cross_at=tuple(range(0, gated * (interval + 1), interval + 1)),
    )


def build(config: IdeficsConfig, *, gate: float, dtype: torch.dtype) -> IdeficsForVisionText2Text:
    """Random weights, by torch's generator, and the gates of the gated layers at ``gate``."""
    model = IdeficsForVisionText2Text._from_config(config, dtype=dtype)
    refill(model, ("alpha_cross_attn", "alpha_dense"), partial(nn.init.constant_, val=gate))
    return model


def random_frames(
    config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.random_frames`."""
    side = config.vision_config.image_size
    return {
        **random_text(text_tokens, first=config.vocab_size, seed=seed),
        PIXELS: random_pixels(frames, (3, side, side), seed=seed)[None],
        SEEN: torch.tensor([0, total]).expand(1, text_tokens, 2),
    }
