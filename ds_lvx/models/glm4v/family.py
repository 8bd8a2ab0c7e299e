"""GLM-4.1V: Qwen3-VL without DeepStack; a video's frames stand at the token of images,
and its tower interpolates the positions of patches by itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import Glm4vForConditionalGeneration
from transformers.models.glm4v.modeling_glm4v import (
    Glm4vModel,
    Glm4vTextAttention,
    Glm4vVisionAttention,
)

from ds_lvx.models.glm4v import batch as batches
from ds_lvx.models.glm4v import dimensions, sized
from ds_lvx.models.glm4v.processor import Processor
from ds_lvx.models.glm4v.tower import SizeRows
from ds_lvx.models.layers import LayerPlan
from ds_lvx.models.qwen2_5_vl import batch as qwen
from ds_lvx.models.qwen2_5_vl import tower
from ds_lvx.models.qwen2_5_vl.family import Qwen25VL
from ds_lvx.models.qwen3_vl import batch as runs
from ds_lvx.models.visual import PIXELS


class Glm4V(Qwen25VL):
    """See `ds_lvx.models.contract.Family` and `Concatenated` for what each part does; what is not
    here is as of Qwen2.5-VL."""

    keys = (PIXELS, qwen.GRID, qwen.VIDEO_PIXELS, qwen.VIDEO_GRID, qwen.TYPES)
    of_text: type[nn.Module] | tuple[type[nn.Module], ...] = Glm4vTextAttention
    within: type[nn.Module] | tuple[type[nn.Module], ...] = Glm4vVisionAttention
    takes = tower.names("position_ids", "cu_seqlens")
    sized = sized
    of_class: Any = Glm4vForConditionalGeneration
    of_positions: Any = Glm4vModel

    # ---- patching

    def install(self, model: Any, plans: Sequence[LayerPlan]) -> None:
        super().install(model, plans)
        self.vision_tower(model).embeddings.register_forward_pre_hook(SizeRows())

    # ---- batches

    token_types = staticmethod(batches.token_types)
    units_of = staticmethod(runs.units)

    def follow(self, config: Any) -> tower.Follow:
        return partial(tower.whole, merge=int(config.vision_config.spatial_merge_size))

    # ---- data and models

    load_processor = staticmethod(Processor.of)
    frame_tokens = staticmethod(sized.frame_tokens)
    dimensions = staticmethod(dimensions.dimensions)
