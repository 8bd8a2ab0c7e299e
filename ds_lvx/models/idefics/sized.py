"""idefics with random weights, cut to any size, and frames to measure with.

A gated layer stands before every n-th layer of the text. A size counts both kinds: of 40 layers of
the published model 8 are gated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from ds_lvx.models.idefics.batch import PIXELS, SEEN
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
        return Size(
            vocabulary=32_000,
            hidden=4096,
            heads=32,
            kv_heads=32,
            mlp=11_008,
            layers=40,
            cross_at=tuple(range(0, 40, 5)),
            positions=2048,
            vision_hidden=1280,
            vision_heads=16,
            vision_mlp=5120,
            vision_layers=32,
            vision_global_layers=0,
            image_size=224,
        )
    found = {key: getattr(config.perceiver_config, key) for key in list(_PERCEIVER)[1:]}
    if not config.use_resampler or any(_PERCEIVER[key] != found[key] for key in found):
        raise NotImplementedError(
            f"got an idefics with use_resampler {config.use_resampler} and {found}; expected the "
            f"resampler of the published models, {_PERCEIVER}: others cannot be cut to a size"
        )
    vision, interval = config.vision_config, config.cross_layer_interval
    gated = config.num_hidden_layers // interval
    return Size(
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        mlp=config.intermediate_size,
        layers=config.num_hidden_layers + gated,
        cross_at=tuple(range(0, gated * (interval + 1), interval + 1)),
        positions=config.max_position_embeddings,
        vision_hidden=vision.embed_dim,
        vision_heads=vision.num_attention_heads,
        vision_mlp=vision.intermediate_size,
        vision_layers=vision.num_hidden_layers,
        vision_global_layers=0,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
    )


def build(config: IdeficsConfig, *, gate: float, dtype: torch.dtype) -> IdeficsForVisionText2Text:
    """Random weights, by torch's generator, and the gates of the gated layers at ``gate``."""
    model = IdeficsForVisionText2Text._from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(("alpha_cross_attn", "alpha_dense")):
            partitioned = hasattr(parameter, "ds_id")
            with deepspeed.zero.GatheredParameters(
                [parameter], modifier_rank=0, enabled=partitioned
            ):
                nn.init.constant_(parameter, gate)
    return model


def random_frames(
    config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.random_frames`."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, config.vocab_size, (1, text_tokens), generator=generator)
    side, mine = config.vision_config.image_size, list(frames)
    pixels = torch.empty(1, len(mine), 3, side, side)
    for place, frame in enumerate(mine):
        generator.manual_seed(seed + 1 + frame)
        # Brighter or darker than others, so that a method which lost some would show.
        shift = torch.randn(3, 1, 1, generator=generator)
        pixels[0, place] = shift + torch.randn(pixels.shape[2:], generator=generator)
    return {
        "input_ids": tokens,
        "labels": tokens,
        PIXELS: pixels,
        SEEN: torch.tensor([0, total]).expand(1, text_tokens, 2),
    }
