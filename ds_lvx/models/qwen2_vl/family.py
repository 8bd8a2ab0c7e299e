"""Qwen2-VL: Qwen2.5-VL without windows in its tower; the numbers of the frames of a video stand in
the place of their seconds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLAttention,
    Qwen2VLModel,
    VisionAttention,
)

from ds_lvx.models.layers import Layer
from ds_lvx.models.qwen2_5_vl import batch as qwen
from ds_lvx.models.qwen2_5_vl import tower
from ds_lvx.models.qwen2_5_vl.family import Qwen25VL
from ds_lvx.models.qwen2_vl import dimensions, sized
from ds_lvx.models.qwen2_vl.processor import Processor
from ds_lvx.models.visual import PIXELS


class Qwen2VL(Qwen25VL):
    """See `ds_lvx.models.contract.Family` and `Concatenated` for what each part does; what is not
    here is as of Qwen2.5-VL."""

    keys = (PIXELS, qwen.GRID, qwen.VIDEO_PIXELS, qwen.VIDEO_GRID, qwen.TYPES)
    of_text = Qwen2VLAttention
    within = VisionAttention
    takes = tower.names("position_ids", "cu_seqlens")
    sized = sized
    of_class = Qwen2VLForConditionalGeneration
    of_positions = Qwen2VLModel

    def layer(self, name: str, module: Any) -> Layer:
        found = super().layer(name, module)
        # What the tower's config calls its hidden size is the text's.
        return found if found.kind == "self" else replace(found, features_dim=module.dim)

    def follow(self, config: Any) -> tower.Follow:
        return partial(tower.whole, merge=int(config.vision_config.spatial_merge_size))

    load_processor = staticmethod(Processor.of)
    dimensions = staticmethod(dimensions.dimensions)
