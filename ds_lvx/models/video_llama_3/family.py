"""VideoLLaMA 3: which modules attend, what its units are, and how its tower runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import VideoLlama3ForConditionalGeneration
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2Model
from transformers.models.video_llama_3.modeling_video_llama_3 import VideoLlama3VisionAttention

from ds_lvx.models.concatenated.batch import Arrange, Unit
from ds_lvx.models.concatenated.family import Concatenated
from ds_lvx.models.concatenated.forward import Encoded
from ds_lvx.models.qwen2_5_vl import batch as qwen
from ds_lvx.models.qwen2_5_vl import tower
from ds_lvx.models.video_llama_3 import batch as batches
from ds_lvx.models.video_llama_3 import dimensions, sized
from ds_lvx.models.video_llama_3.processor import Processor
from ds_lvx.models.visual import PIXELS


class VideoLlama3(Concatenated):
    """See `ds_lvx.models.contract.Family` and `Concatenated` for what each part does."""

    keys = (
        *(PIXELS, qwen.GRID, batches.MERGES),
        *(qwen.VIDEO_PIXELS, qwen.VIDEO_GRID, batches.VIDEO_MERGES, batches.MASK),
    )
    patterns: Mapping[str, str] = {"local": "*vision_model*", "self": "*language_model*.self_attn"}
    of_text = Qwen2Attention
    within = VideoLlama3VisionAttention
    sources = (PIXELS, qwen.VIDEO_PIXELS)
    takes = (*tower.names("position_ids", "cu_seqlens", "merge_sizes"), batches.KEPT)
    bounded_media = True
    sized = sized
    of_class = VideoLlama3ForConditionalGeneration

    # ---- patching

    def check(self, model: Any, *, sp_size: int) -> None:
        text = self.text_model(model)
        if not isinstance(text, Qwen2Model):
            raise NotImplementedError(
                f"got a text model of class {type(text).__name__}; expected a Qwen2Model, as the "
                "published models have it"
            )
        super().check(model, sp_size=sp_size)

    @staticmethod
    def encode(module: Any, given: Mapping[str, Any]) -> Encoded:
        features = tower.run(module.vision_model, given).last_hidden_state
        kept = given[batches.KEPT]
        if kept is not None:  # what is left out is not projected, either
            features = features.index_select(0, kept)
        return Encoded(module.projector(features))

    # ---- batches

    def units(self, batch: Mapping[str, Any], ids: Tensor, config: Any) -> list[Unit]:
        return batches.units(batch, ids, config)

    def visual_tokens(self, ids: Tensor, config: Any) -> Tensor:
        return qwen.token_types(ids, config) > 0

    def arrange(self, config: Any) -> Arrange:
        return batches.arrange

    def blank(self, model: Any) -> dict[str, Any]:
        return batches.blank(model.config)

    # ---- data

    load_processor = staticmethod(Processor.of)

    def media_tokens(self, processor: Processor) -> tuple[str, ...]:
        return (processor.image_token, processor.video_token)

    # ---- models

    def vision_tower(self, model: Any) -> Any:
        return model.model.vision_model

    frame_tokens = staticmethod(sized.frame_tokens)
    dimensions = staticmethod(dimensions.dimensions)
