"""MOSS-VL: which modules attend, and what the sharded text model needs.

The model's code comes with its checkpoints; nothing of it is imported here, and its modules are
found by name and by what they have. The text model alternates self-attention layers over the text
and cross-attention layers from the text to all frames. Both run on this rank's shards; the vision
tower runs as it is, on this rank's frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.inputs import generating, plain_inputs
from ds_lvx.models.layers import Kind, Layer, LayerPlan
from ds_lvx.models.moss_vl import batch as batches
from ds_lvx.models.moss_vl import checkpoint, dimensions, forward, sized
from ds_lvx.models.moss_vl.attention import Attention, mask_of
from ds_lvx.models.moss_vl.processor import Processor, media_text
from ds_lvx.models.patch import PatchedAttention
from ds_lvx.models.sized import Sized

_MODEL = "MossVLForConditionalGeneration"


class MossVL(Sized):
    """See `ds_lvx.models.contract.Family` for what each part does."""

    keys = batches.KEYS
    sized = sized
    features_key = forward.STATES
    zigzag = True
    splits_prompt = True
    shares_prefixes = True
    patterns: Mapping[str, str] = {
        "local": "*visual*",
        "cross": "*.cross_attn",
        "self": "*language_model*.self_attn",
    }
    lora_targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"

    # ---- patching

    def find(self, model: nn.Module) -> Any:
        return next((m for m in model.modules() if _is_named(m, _MODEL)), None)

    def attention_layers(self, model: Any) -> list[Layer]:
        names = {module: name for name, module in model.named_modules()}
        vision = model.model.visual.config
        width = vision.hidden_size
        heads = vision.num_heads, vision.num_heads, width // vision.num_heads, width
        blocks = [block.attn for block in model.model.visual.blocks]
        found = [Layer(names[module], "local", module, *heads) for module in blocks]
        for layer in model.model.language_model.layers:
            found += [_text_layer(names[m], m) for m in layer.children() if _kind(m) is not None]
        return found

    def forward(self, layer: Layer, plan: LayerPlan) -> PatchedAttention:
        return Attention(layer, plan)

    def text_model(self, model: Any) -> nn.Module:
        return model.model.language_model

    def prepare(self, batch: ShardedBatch, arguments: Mapping[str, Any]) -> dict[str, Any]:
        cross = self.decode(batch, arguments)
        return {**cross, "attention_mask": cross["cross_attention_mask"], "use_cache": False}

    def install(self, model: Any, plans: Sequence[LayerPlan]) -> None:
        forward.install(model, offloads=any(plan.features == "offload" for plan in plans))
        plain_inputs(model, self.keys)

    def generator(self, model: Any) -> Any:
        return generating(model)

    def decode(self, batch: ShardedBatch, arguments: Mapping[str, Any]) -> dict[str, Any]:
        text, rows = arguments["inputs_embeds"], batch.row_mask
        return {
            # Of attention's output and of the MLP's: the layer is the identity on those rows.
            "full_text_row_masked_out_mask": None if rows is None else rows.to(text.dtype),
            "cross_attention_mask": mask_of(batch, arguments),
        }

    # ---- batches

    visual = staticmethod(batches.visual)
    blank = staticmethod(batches.blank)

    def media_text(self, processor: Any, times: Sequence[float] | None) -> str:
        return media_text(times)

    def frames(
        self,
        processor: Any,
        input_ids: Tensor,
        pictures: Sequence[Iterable[Any]],
        *,
        count: int,
        dtype: torch.dtype,
        begins: Tensor | None = None,
        first: int = 0,
    ) -> dict[str, Tensor]:
        given = {"dtype": dtype, "begins": begins, "first": first}
        made: dict[str, Tensor] = processor.frames(input_ids, pictures, **given)
        return made

    packed_frames = frames

    # ---- models

    def load(
        self, name: str, dtype: torch.dtype, *, trust_remote_code: bool = False, **more: Any
    ) -> Any:
        return checkpoint.load(name, dtype, trust_remote_code=trust_remote_code, **more)

    load_processor = staticmethod(Processor.of)
    dimensions = staticmethod(dimensions.dimensions)

    def frame_tokens(self, config: Any) -> int:
        """Those of one of 256 frames of a film; others are larger, or smaller. Or of the frames
        that `random_frames` makes."""
        side = getattr(config.vision_config, "image_size", None)
        if side is not None:
            return sized.tokens_of(side, config.vision_config)
        return dimensions.dimensions(config.to_dict(), "", "").frame_tokens

    def regions(self) -> Mapping[str, str]:
        return {
            r".*\bcross_attn": "cross_attention",
            # Its layers as well: one that is checkpointed runs again by itself.
            r".*\blanguage_model(\.layers\.\d+)?": "text",
            r".*\blm_head": "text",
            r".*\bvisual": "vision",
            r".*\bseparator_token": "vision",
        }

    def vision_tower(self, model: Any) -> Any:
        return model.model.visual


def _is_named(module: nn.Module, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(module).__mro__)


def _kind(module: nn.Module) -> Kind | None:
    if not hasattr(module, "q_norm"):
        return None
    return "self" if module.is_causal else "cross"


def _text_layer(name: str, module: Any) -> Layer:
    kind, size = _kind(module), int(module.head_dim)
    assert kind is not None
    # Not the module's own count of heads, which self-attention does not have.
    heads = int(module.config.num_attention_heads)
    kv_heads = heads // int(module.num_key_value_groups)
    return Layer(name, kind, module, heads, kv_heads, size, int(module.config.hidden_size))
