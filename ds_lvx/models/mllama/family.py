"""Llama-3.2-Vision (mllama): which modules attend, and what the sharded text model needs.

The text model alternates self-attention layers over the text and cross-attention layers from the
text to all visual tokens. Both run on this rank's shards; the vision tower runs as it is, on this
rank's images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import MllamaConfig
from transformers.models.mllama.modeling_mllama import (
    MllamaForConditionalGeneration,
    MllamaTextCrossAttention,
    MllamaTextSelfAttention,
    MllamaVisionAttention,
)

from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.contract import Family
from ds_lvx.models.dispatch import Dispatched
from ds_lvx.models.layers import Kind, Layer, LayerPlan
from ds_lvx.models.mllama import batch as batches
from ds_lvx.models.mllama import dimensions, features, tiny
from ds_lvx.models.mllama import frames as framing
from ds_lvx.models.mllama.attention import CrossAttention, RecomputedSelfAttention
from ds_lvx.models.patch import PatchedAttention, refuse_growing_rope

_KINDS: dict[type[nn.Module], Kind] = {
    MllamaTextCrossAttention: "cross",
    MllamaTextSelfAttention: "self",
    MllamaVisionAttention: "local",
}


class Mllama(Family):
    """See `ds_lvx.models.contract.Family` for what each part does."""

    keys = batches.KEYS
    features_key = batches.STATES
    zigzag = True
    splits_prompt = True
    shares_prefixes = True
    patterns: Mapping[str, str] = {
        "local": "*vision_model*",
        "cross": "*.cross_attn",
        "self": "*language_model*.self_attn",
    }
    # The text model's projections; the vision tower's have other names around them.
    lora_targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"

    # ---- patching

    def find(self, model: nn.Module) -> MllamaForConditionalGeneration | None:
        inside = (m for m in model.modules() if isinstance(m, MllamaForConditionalGeneration))
        return next(inside, None)

    def attention_layers(self, model: MllamaForConditionalGeneration) -> list[Layer]:
        return [
            _layer(name, kind, module)
            for name, module in model.named_modules()
            for of_kind, kind in _KINDS.items()
            if isinstance(module, of_kind)
        ]

    def forward(self, layer: Layer, plan: LayerPlan) -> PatchedAttention:
        if layer.kind == "cross":
            return CrossAttention(layer.module, plan)
        kind = RecomputedSelfAttention if plan.recompute_kv else Dispatched
        return kind(layer.module, plan)

    def text_model(self, model: MllamaForConditionalGeneration) -> nn.Module:
        return model.model.language_model

    def check(self, model: MllamaForConditionalGeneration, *, sp_size: int) -> None:
        refuse_growing_rope(model.model.language_model.rotary_emb.rope_type, sp_size)

    def prepare(self, batch: ShardedBatch, arguments: Mapping[str, Any]) -> dict[str, Any]:
        states, rows = arguments[self.features_key], batch.row_mask
        return {
            "full_text_row_masked_out_mask": None if rows is None else rows.to(states.dtype),
            # Four dimensions stop transformers from building a mask of [s, s]; nobody reads it.
            "attention_mask": arguments["input_ids"].new_zeros(1, 1, 1, 1),
            "use_cache": False,
        }

    def generator(self, model: MllamaForConditionalGeneration) -> MllamaForConditionalGeneration:
        if 0 in model.config.get_text_config().cross_attention_layers:
            raise NotImplementedError(
                "got cross_attention_layers that begin with layer 0, by whose cache transformers "
                "counts the tokens of the text; expected a first layer of text alone"
            )
        return model

    def decode(self, batch: ShardedBatch, arguments: Mapping[str, Any]) -> dict[str, Any]:
        states, rows = arguments[self.features_key], batch.row_mask
        if states is None or rows is None:
            return {}
        return {"full_text_row_masked_out_mask": rows.to(states.dtype)}

    def install(self, model: MllamaForConditionalGeneration, plans: Sequence[LayerPlan]) -> None:
        features.install(model, offloads=any(plan.features == "offload" for plan in plans))

    def encoders(self, model: MllamaForConditionalGeneration) -> list[nn.Module]:
        return [self.vision_tower(model).transformer, self.vision_tower(model).global_transformer]

    # ---- batches

    visual = staticmethod(batches.visual)
    blank = staticmethod(batches.blank)
    finish_text = staticmethod(framing.finish_text)

    frames = packed_frames = staticmethod(framing.processed)

    pixel_batch = staticmethod(framing.ready)
    random_frames = staticmethod(framing.random_frames)

    # ---- models

    def vision_tower(self, model: MllamaForConditionalGeneration) -> Any:
        return model.model.vision_model

    dimensions = staticmethod(dimensions.dimensions)

    def frame_tokens(self, config: MllamaConfig) -> int:
        vision: Any = config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2 + 1
        return int(vision.max_num_tiles * patches)

    config = staticmethod(tiny.config_of)
    size = staticmethod(tiny.size_of)
    build = staticmethod(tiny.build)

    def tiny(self) -> tuple[MllamaConfig, Any]:
        processor = tiny.tiny_processor()
        return tiny.tiny_config(processor.image_token_id), processor

    def regions(self) -> Mapping[str, str]:
        return {
            r".*\bcross_attn": "cross_attention",
            # Its layers as well: one that is checkpointed runs again by itself.
            r".*\blanguage_model(\.layers\.\d+)?": "text",
            r".*\blm_head": "text",
            r".*\bvision_model": "vision",
            r".*\bmulti_modal_projector": "vision",
        }


def _layer(name: str, kind: Kind, module: Any) -> Layer:
    heads = int(module.num_heads)
    kv_heads = int(getattr(module, "num_key_value_heads", heads))
    width = int(module.k_proj.in_features)
    return Layer(name, kind, module, heads, kv_heads, int(module.head_dim), width)
