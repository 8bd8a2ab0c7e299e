"""Qwen3-VL: which modules attend, what its units are, and how its tower runs.

Layers of the tower give features beside its last (DeepStack). The first layers of the text add them
to the visual tokens, which are on the rank that made the features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLModel,
    Qwen3VLTextAttention,
    Qwen3VLVisionAttention,
)

from ds_lvx.models.batch import ShardedBatch, Text
from ds_lvx.models.concatenated.batch import Unit
from ds_lvx.models.concatenated.family import Concatenated
from ds_lvx.models.concatenated.forward import Deep, Encoded
from ds_lvx.models.qwen2_5_vl import batch as qwen
from ds_lvx.models.qwen3_vl import batch as batches
from ds_lvx.models.visual import PIXELS


class Qwen3VL(Concatenated):
    """See `ds_lvx.models.contract.Family` and `Concatenated` for what each part does."""

    keys = (PIXELS, qwen.GRID, qwen.VIDEO_PIXELS, qwen.VIDEO_GRID, qwen.TYPES)
    patterns: Mapping[str, str] = {"local": "*visual.*", "self": "*language_model*.self_attn"}
    of_text = Qwen3VLTextAttention
    within = Qwen3VLVisionAttention
    sources = (PIXELS, qwen.VIDEO_PIXELS)
    takes = (PIXELS, qwen.GRID)

    # ---- patching

    def find(self, model: nn.Module) -> Qwen3VLForConditionalGeneration | None:
        inside = (m for m in model.modules() if isinstance(m, Qwen3VLForConditionalGeneration))
        return next(inside, None)

    @staticmethod
    def encode(module: Any, given: Mapping[str, Any]) -> Encoded:
        made = module.get_image_features(given[PIXELS], given[qwen.GRID], return_dict=True)
        deep = [torch.cat(each) for each in made.deepstack_features]
        return Encoded(torch.cat(made.pooler_output), deep)

    def prepare(self, batch: ShardedBatch, arguments: Mapping[str, Any]) -> dict[str, Any]:
        given, deep = super().prepare(batch, arguments), batch.deep
        if not isinstance(deep, Deep):
            return given
        rows, length, _ = arguments["inputs_embeds"].shape
        mask = torch.zeros(rows * length, dtype=torch.bool, device=deep.places.device)
        mask[deep.places] = True
        return {
            **given,
            "visual_pos_masks": mask.view(rows, length),
            "deepstack_visual_embeds": list(deep.features),
        }

    # ---- batches

    def units(self, batch: Mapping[str, Any], ids: Tensor, config: Any) -> list[Unit]:
        return batches.units(batch, ids, config)

    def visual_tokens(self, ids: Tensor, config: Any) -> Tensor:
        return qwen.token_types(ids, config) > 0

    def positions(self, batch: Mapping[str, Any], text: Text, config: Any) -> Tensor | None:
        return qwen.positions(batch, text, config, model=Qwen3VLModel)

    @staticmethod
    def arrange(units: Sequence[Unit], rows: Sequence[Tensor]) -> dict[str, Tensor]:
        return qwen.arrange(units, rows)

    def blank(self, model: Any) -> dict[str, Tensor]:
        return qwen.blank(model.config)

    # ---- models

    def vision_tower(self, model: Any) -> Any:
        return model.model.visual
