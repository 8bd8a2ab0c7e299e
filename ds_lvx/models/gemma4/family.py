"""Gemma 4: which modules attend, what its units are, and how its tower runs.

Most layers of the text see a window, and there the tokens of an image see each other in both
directions, in the larger models; the others are causal, and have other heads. Of the smaller models
the last layers take keys and values of one before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, Gemma4ForConditionalGeneration
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4TextAttention,
    Gemma4TextExperts,
    Gemma4VisionAttention,
)

from ds_lvx.models.concatenated.batch import Sequences
from ds_lvx.models.concatenated.family import SLIDING
from ds_lvx.models.concatenated.forward import Embed, Encoded
from ds_lvx.models.gemma4 import batch as batches
from ds_lvx.models.gemma4 import dimensions, forward, sized
from ds_lvx.models.gemma4 import processor as processors
from ds_lvx.models.layers import LayerPlan
from ds_lvx.models.patch import KeepForward
from ds_lvx.models.qwen3_vl_moe.experts import OfExperts
from ds_lvx.models.text import Text
from ds_lvx.models.visual import PIXELS


class Gemma4(OfExperts):
    """See `ds_lvx.models.contract.Family` and `Concatenated` for what each part does."""

    keys = (
        *(PIXELS, batches.VIDEOS, *batches.PLACES.values()),
        *(batches.TYPES, batches.COUNTS, *batches.AUDIO),
    )
    patterns: Mapping[str, str] = {"local": "*vision_tower*", "self": "*language_model*.self_attn"}
    of_text = Gemma4TextAttention
    of_experts = Gemma4TextExperts
    within = Gemma4VisionAttention
    embed: type[Embed] = forward.EmbedForLayers
    sources = (PIXELS, batches.VIDEOS)
    takes = (PIXELS, batches.PLACES[PIXELS], batches.TAKEN, batches.MASK)
    sized = sized
    of_class = Gemma4ForConditionalGeneration
    layer_types = ("full_attention", SLIDING)

    # ---- patching

    def check(self, model: Any, *, sp_size: int) -> None:
        super().check(model, sp_size=sp_size)
        if model.config.vision_config is None:
            raise NotImplementedError(
                "got a Gemma 4 without vision_config; expected one with a vision tower, as the "
                "published models have it"
            )
        if model.config.text_config.use_bidirectional_attention == "all":
            raise NotImplementedError(
                'got a text model with use_bidirectional_attention "all"; expected "vision" or '
                "null, as published models have it: one that sees the text before a token, and "
                "generates"
            )

    @staticmethod
    def encode(module: Any, given: Mapping[str, Any]) -> Encoded:
        return Encoded(forward.encoded(module, given))

    def install(self, model: Any, plans: Sequence[LayerPlan]) -> None:
        super().install(model, plans)
        inner = self.inner(model)
        inner.register_forward_pre_hook(KeepForward(inner, forward.Forward(inner)))

    # ---- batches

    units = staticmethod(batches.units)
    visual_tokens = staticmethod(batches.visual_tokens)

    def text(self, batch: Mapping[str, Any], model: Any) -> Text:
        made, of_text = super().text(batch, model), model.config.text_config
        assert isinstance(made, Sequences)
        window = of_text.sliding_window if SLIDING in of_text.layer_types else None
        each_other = of_text.use_bidirectional_attention == "vision"
        ends = batches.ends(batch, made.input_ids) if each_other else None
        return replace(made, recent_ends=ends, window=window)

    def pixels(self, batch: Mapping[str, Any], config: Any) -> dict[str, Tensor]:
        given = super().pixels(batch, config)
        return {key: batches.patches(each, key, config) for key, each in given.items()}

    arrange = staticmethod(batches.arrange)

    def blank(self, model: Any) -> dict[str, Tensor]:
        return batches.blank(model.config)

    # ---- data

    def load_processor(self, name: str) -> processors.Processor:
        return processors.Processor.of(name, AutoConfig.from_pretrained(name))

    def media_tokens(self, processor: Any) -> tuple[str, ...]:
        return (processors.IMAGE_TOKEN, processors.VIDEO_TOKEN)

    inputs = staticmethod(processors.inputs)

    # ---- models

    dimensions = staticmethod(dimensions.dimensions)

    def build(self, config: Any, *, gate: float, dtype: torch.dtype) -> Any:
        return sized.build(config, dtype=dtype)

    def regions(self) -> Mapping[str, str]:
        parts = r".*\b(vision_tower\.(patch_embedder|encoder|pooler)|embed_vision)"
        return {**super().regions(), parts: "vision"}

    def vision_tower(self, model: Any) -> Any:
        return model.model.vision_tower

    def frame_tokens(self, config: Any) -> int:
        return sized.frame_side(config) ** 2
