"""idefics (v1): which modules attend, and what the sharded text needs.

Before every n-th layer of the text a gated layer attends to the images. Both run on this rank's
shards; vision encoder and perceiver resampler run as they are, on this rank's images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import IdeficsConfig, IdeficsForVisionText2Text
from transformers.models.idefics.modeling_idefics import IdeficsAttention
from transformers.models.idefics.perceiver import IdeficsPerceiverAttention
from transformers.models.idefics.vision import IdeficsVisionAttention

from ds_lvx.models.dispatch import Dispatched
from ds_lvx.models.idefics import batch as batches
from ds_lvx.models.idefics import dimensions, forward, sized, tiny
from ds_lvx.models.idefics import processor as processors
from ds_lvx.models.idefics.attention import Attention
from ds_lvx.models.layers import Kind, Layer, LayerPlan
from ds_lvx.models.patch import PatchedAttention, refuse_growing_rope
from ds_lvx.models.sized import Sized

_LOCAL = (IdeficsVisionAttention, IdeficsPerceiverAttention)


class Idefics(Sized):
    """See `ds_lvx.models.contract.Family` for what each part does."""

    keys = batches.KEYS
    sized = sized
    features_key = forward.FEATURES
    zigzag = True
    splits_prompt = True
    shares_prefixes = True
    skips_vision = False  # gated layers run their MLP for every token
    patterns: Mapping[str, str] = {
        "local": "*vision_model*",
        "cross": "*.cross_attn",
        "self": "*model.layers.*.self_attn",
    }
    # The text model's projections; encoder and perceiver have other names around theirs.
    lora_targets = (
        r"(.*\.)?model\.(layers|gated_cross_attn_layers)\.\d+\.\w+\.(q_proj|k_proj|v_proj|o_proj)"
    )

    # ---- patching

    def find(self, model: nn.Module) -> IdeficsForVisionText2Text | None:
        inside = (m for m in model.modules() if isinstance(m, IdeficsForVisionText2Text))
        return next(inside, None)

    def attention_layers(self, model: IdeficsForVisionText2Text) -> list[Layer]:
        return [
            _layer(name, module)
            for name, module in model.named_modules()
            if isinstance(module, (IdeficsAttention, *_LOCAL))
        ]

    def forward(self, layer: Layer, plan: LayerPlan) -> PatchedAttention:
        if layer.kind == "self" and not plan.recompute_kv:
            return Dispatched(layer.module, plan)
        return Attention(layer.module, plan)

    def text_model(self, model: IdeficsForVisionText2Text) -> nn.Module:
        return model.model

    def check(self, model: IdeficsForVisionText2Text, *, sp_size: int) -> None:
        layers: Any = model.model.layers
        refuse_growing_rope(layers[0].self_attn.rotary_emb.rope_type, sp_size)

    def generator(self, model: IdeficsForVisionText2Text) -> IdeficsForVisionText2Text:
        return model

    def install(self, model: IdeficsForVisionText2Text, plans: Sequence[LayerPlan]) -> None:
        forward.install(model, offloads=any(plan.features == "offload" for plan in plans))

    # ---- batches

    visual = staticmethod(batches.visual)

    def blank(self, model: IdeficsForVisionText2Text) -> dict[str, Tensor]:
        return batches.blank(model.config)

    def media_text(self, processor: Any, times: Sequence[float] | None) -> str:
        return processors.media_text(times)

    frames = packed_frames = staticmethod(processors.frames)

    # ---- models

    load_processor = staticmethod(processors.Processor.of)

    def vision_tower(self, model: IdeficsForVisionText2Text) -> Any:
        return model.model.vision_model

    dimensions = staticmethod(dimensions.dimensions)
    frame_tokens = staticmethod(batches.image_tokens)
    build = staticmethod(sized.build)

    def tiny(self) -> tuple[IdeficsConfig, processors.Processor]:
        processor = tiny.tiny_processor()
        return tiny.tiny_config(processor), processor

    def regions(self) -> Mapping[str, str]:
        return {
            r".*\bcross_attn": "cross_attention",
            # Its layers as well: one that is checkpointed runs again by itself.
            r"(.*\.)?model(\.(layers|gated_cross_attn_layers)\.\d+)?": "text",
            r".*\blm_head": "text",
            r".*\bvision_model": "vision",
            r".*\bperceiver_resampler": "vision",
        }


def _layer(name: str, module: Any) -> Layer:
    kind: Kind = "local"
    if isinstance(module, IdeficsAttention):
        kind = "cross" if module.is_cross_attention else "self"
    heads = int(getattr(module, "n_heads", None) or module.num_heads)
    width = int(module.k_proj.in_features)
    return Layer(name, kind, module, heads, heads, int(module.head_dim), width)
