"""Qwen3-VL: which modules attend, what its units are, and how its tower runs.

Layers of the tower give features beside its last (DeepStack). The first layers of the text add them
to the visual tokens, which are on the rank that made the features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLModel,
    Qwen3VLTextAttention,
    Qwen3VLVisionAttention,
)

from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.concatenated.forward import Deep, Encoded
from ds_lvx.models.layers import LayerPlan
from ds_lvx.models.qwen2_5_vl import batch as qwen
from ds_lvx.models.qwen2_5_vl import tower
from ds_lvx.models.qwen2_5_vl.family import Qwen25VL
from ds_lvx.models.qwen3_vl import batch as batches
from ds_lvx.models.qwen3_vl import dimensions, sized
from ds_lvx.models.qwen3_vl.deep import AddDeep
from ds_lvx.models.qwen3_vl.processor import Processor
from ds_lvx.models.visual import PIXELS


class Qwen3VL(Qwen25VL):
    """See `ds_lvx.models.contract.Family` and `Concatenated` for what each part does; what is not
    here is as of Qwen2.5-VL.

    Attributes:
        deep: the text adds features of the tower's layers.
    """

    deep = True
    keys = (PIXELS, qwen.GRID, qwen.VIDEO_PIXELS, qwen.VIDEO_GRID, qwen.TYPES)
    of_text: type[nn.Module] = Qwen3VLTextAttention
    within: type[nn.Module] = Qwen3VLVisionAttention
    takes = tower.names("position_ids", "cu_seqlens", "interp_indices", "interp_weights")
    sized = sized
    of_class: Any = Qwen3VLForConditionalGeneration
    of_positions: Any = Qwen3VLModel

    # ---- patching

    @staticmethod
    def encode(module: Any, given: Mapping[str, Any]) -> Encoded:
        made = tower.run(module.visual, given)
        return Encoded(made.pooler_output, getattr(made, "deepstack_features", ()))

    def install(self, model: Any, plans: Sequence[LayerPlan]) -> None:
        super().install(model, plans)
        if self.deep:
            text = self.text_model(model)
            text.register_forward_pre_hook(AddDeep(text))

    def prepare(self, batch: ShardedBatch, arguments: Mapping[str, Any]) -> dict[str, Any]:
        given, deep = super().prepare(batch, arguments), batch.deep
        if not isinstance(deep, Deep):
            return given
        return {
            **given,
            "visual_pos_masks": deep.places,
            "deepstack_visual_embeds": list(deep.features),
        }

    # ---- batches

    units_of = staticmethod(batches.units)

    def follow(self, config: Any) -> tower.Follow:
        vision = config.vision_config
        side = math.isqrt(int(vision.num_position_embeddings))
        return partial(tower.interpolated, merge=int(vision.spatial_merge_size), side=side)

    # ---- data and models

    load_processor = staticmethod(Processor.of)
    frame_tokens = staticmethod(sized.frame_tokens)
    dimensions = staticmethod(dimensions.dimensions)
