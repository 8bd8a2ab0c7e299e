"""T5Gemma2: which modules attend, and what the sharded encoder and decoder need.

The encoder's rows hold text and image tokens, which attend to each other; they are as long as the
visual input. The decoder's text attends in one softmax to itself and to all of those. Both are
sharded; the vision tower runs as it is, on this rank's images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Gemma2ForConditionalGeneration
from transformers.models.t5gemma2.modeling_t5gemma2 import (
    T5Gemma2MergedAttention,
    T5Gemma2SelfAttention,
    T5Gemma2TextScaledWordEmbedding,
)

from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.layers import Kind, Layer, LayerPlan
from ds_lvx.models.patch import KeepForward, PatchedAttention, refuse_growing_rope
from ds_lvx.models.sized import Sized
from ds_lvx.models.t5gemma2 import batch as batches
from ds_lvx.models.t5gemma2 import dimensions, forward, sized
from ds_lvx.models.t5gemma2 import processor as processors
from ds_lvx.models.t5gemma2.attention import EncoderAttention, MergedAttention


class T5Gemma2(Sized):
    """See `ds_lvx.models.contract.Family` for what each part does."""

    keys = batches.KEYS
    sized = sized
    features_key = forward.FEATURES
    zigzag = True
    patterns: Mapping[str, str] = {
        "local": "*vision_tower*",
        "cross": "*decoder.layers.*.self_attn",
        "self": "*encoder.text_model.*.self_attn",
    }
    without: Mapping[str, str] = {"ulysses": "the decoder's one softmax needs lse"}
    lora_targets = (
        r"(.*\.)?(text_model|decoder)\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)"
    )

    # ---- patching

    def find(self, model: nn.Module) -> T5Gemma2ForConditionalGeneration | None:
        inside = (m for m in model.modules() if isinstance(m, T5Gemma2ForConditionalGeneration))
        return next(inside, None)

    def attention_layers(self, model: T5Gemma2ForConditionalGeneration) -> list[Layer]:
        return [
            _layer(name, module)
            for name, module in model.named_modules()
            if hasattr(module, "q_proj")
        ]

    def check(self, model: T5Gemma2ForConditionalGeneration, *, sp_size: int) -> None:
        config: Any = model.config
        for part in (config.encoder.text_config, config.decoder):
            if part.attn_logit_softcapping is not None:
                raise NotImplementedError(
                    f"got attn_logit_softcapping {part.attn_logit_softcapping}; expected null, as "
                    "published models have it: the sharded attention takes scores as they are"
                )
            for each in part.rope_parameters.values():
                refuse_growing_rope("default" if each is None else each["rope_type"], sp_size)

    def forward(self, layer: Layer, plan: LayerPlan) -> PatchedAttention:
        if layer.kind == "self":
            return EncoderAttention(layer, plan)
        if plan.method in ("ulysses", "auto"):
            raise NotImplementedError(
                f"ds_lvx.layers: got method {plan.method!r} for {plan.name}, a decoder layer of "
                "T5Gemma2, whose one softmax needs lse; use 'lvx' or 'ring'"
            )
        if plan.recompute_kv:
            raise NotImplementedError(
                f"ds_lvx.layers: got recompute_kv for {plan.name}, a decoder layer of T5Gemma2, "
                "whose projections of K and V are those of the text as well and must have one "
                "gradient; remove it, and checkpoint the layers, which keeps K and V of one layer"
            )
        return MergedAttention(layer, plan)

    def text_model(self, model: T5Gemma2ForConditionalGeneration) -> nn.Module:
        return model.model.decoder

    def prepare(self, batch: ShardedBatch, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return forward.masks(arguments)

    def decode(self, batch: ShardedBatch, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {**forward.masks(arguments), **forward.rules(arguments)}

    def generator(self, model: T5Gemma2ForConditionalGeneration) -> Any:
        return model

    def install(self, model: T5Gemma2ForConditionalGeneration, plans: Sequence[LayerPlan]) -> None:
        model.register_forward_pre_hook(forward.Begin(), with_kwargs=True)
        model.model.encoder.register_forward_pre_hook(forward.Embed(), with_kwargs=True)
        for module in model.modules():
            if isinstance(module, T5Gemma2TextScaledWordEmbedding):
                module.register_forward_pre_hook(KeepForward(module, forward.Words(module)))

    # ---- batches

    text = staticmethod(batches.answer)
    visual = staticmethod(batches.visual)

    def blank(self, model: T5Gemma2ForConditionalGeneration) -> dict[str, Tensor]:
        return batches.blank(model.config)

    media_text = staticmethod(processors.media_text)
    inputs = staticmethod(processors.inputs)

    def frames(
        self,
        processor: Any,
        input_ids: Tensor,
        pictures: Sequence[Iterable[Any]],
        *,
        count: int,
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        return processors.frames(processor, pictures, dtype=dtype)

    # ---- models

    load_processor = staticmethod(processors.Processor.of)

    def vision_tower(self, model: T5Gemma2ForConditionalGeneration) -> Any:
        return model.model.encoder.vision_tower

    frame_tokens = staticmethod(batches.image_tokens)
    dimensions = staticmethod(dimensions.dimensions)
    build = staticmethod(sized.build)

    def regions(self) -> Mapping[str, str]:
        return {
            r".*\bdecoder\.layers\.\d+\.self_attn": "cross_attention",
            # Its layers as well: one that is checkpointed runs again by itself.
            r".*\b(text_model|decoder)(\.layers\.\d+)?": "text",
            r".*\blm_head": "text",
            r".*\bvision_tower": "vision",
            r".*\bmulti_modal_projector": "vision",
        }


def _layer(name: str, module: Any) -> Layer:
    config = module.config
    heads = int(config.num_attention_heads)
    kind: Kind = "local"
    if isinstance(module, T5Gemma2SelfAttention):
        kind = "self"
    elif isinstance(module, T5Gemma2MergedAttention):
        kind = "cross"
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(config.hidden_size)
    return Layer(name, kind, module, heads, kv_heads, int(module.head_dim), width)
