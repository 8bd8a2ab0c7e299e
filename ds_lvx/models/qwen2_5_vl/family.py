"""Qwen2.5-VL: which modules attend, what its units are, and how its tower runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLAttention,
    Qwen2_5_VLModel,
    Qwen2_5_VLVisionAttention,
)

from ds_lvx.models.concatenated.batch import Arrange, Unit
from ds_lvx.models.concatenated.family import Concatenated
from ds_lvx.models.concatenated.forward import Encoded
from ds_lvx.models.qwen2_5_vl import batch as batches
from ds_lvx.models.qwen2_5_vl import dimensions, sized, tower
from ds_lvx.models.qwen2_5_vl.processor import Processor
from ds_lvx.models.text import Text
from ds_lvx.models.visual import PIXELS


class Qwen25VL(Concatenated):
    """See `ds_lvx.models.contract.Family` and `Concatenated` for what each part does.

    Attributes:
        of_positions: the class that knows the positions.
    """

    keys: tuple[str, ...] = (
        PIXELS,
        batches.GRID,
        batches.VIDEO_PIXELS,
        batches.VIDEO_GRID,
        batches.SECONDS,
        batches.TYPES,
    )
    patterns: Mapping[str, str] = {"local": "*visual.*", "self": "*language_model*.self_attn"}
    of_text: type[nn.Module] | tuple[type[nn.Module], ...] = Qwen2_5_VLAttention
    within: type[nn.Module] | tuple[type[nn.Module], ...] = Qwen2_5_VLVisionAttention
    sources = (PIXELS, batches.VIDEO_PIXELS)
    bounded_media = True
    takes = tower.names("position_ids", "cu_seqlens", "window_index", "cu_window_seqlens")
    sized = sized
    of_class: Any = Qwen2_5_VLForConditionalGeneration
    of_positions: Any = Qwen2_5_VLModel

    # ---- patching

    @staticmethod
    def encode(module: Any, given: Mapping[str, Any]) -> Encoded:
        return Encoded(tower.run(module.visual, given).pooler_output)

    # ---- batches

    def units(self, batch: Mapping[str, Any], ids: Tensor, config: Any) -> list[Unit]:
        types = self.token_types(ids, config)
        batches.check_types(batch, types)
        return self.units_of(batch, types, config)

    def token_types(self, ids: Tensor, config: Any) -> Tensor:
        """int64 ``[B, T]``: 1 for an image's tokens, 2 for a video's, 0 for text."""
        return batches.token_types(ids, config)

    def units_of(self, batch: Mapping[str, Any], types: Tensor, config: Any) -> list[Unit]:
        """`units`, by the types of the tokens."""
        return batches.units(batch, types, config)

    def visual_tokens(self, ids: Tensor, config: Any) -> Tensor:
        return self.token_types(ids, config) > 0

    def positions(self, batch: Mapping[str, Any], text: Text, config: Any) -> Tensor | None:
        types = self.token_types(text.input_ids, config)
        return batches.positions(batch, text, config, types=types, model=self.of_positions)

    def arrange(self, config: Any) -> Arrange:
        return partial(batches.arrange, follow=self.follow(config))

    def follow(self, config: Any) -> tower.Follow:
        """What the tower makes of its grids."""
        vision = config.vision_config
        return partial(
            tower.windows,
            merge=int(vision.spatial_merge_size),
            window=int(vision.window_size),
            patch=int(vision.patch_size),
        )

    def blank(self, model: Any) -> dict[str, Any]:
        return batches.blank(model.config, self.follow(model.config))

    # ---- data

    load_processor = staticmethod(Processor.of)

    def media_tokens(self, processor: Processor) -> tuple[str, ...]:
        return (processor.image_token, processor.video_token)

    # ---- models

    def vision_tower(self, model: Any) -> Any:
        return model.model.visual

    frame_tokens = staticmethod(sized.frame_tokens)
    dimensions = staticmethod(dimensions.dimensions)
