"""InternVL: which modules attend, what its units are, and how its tower runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, InternVLForConditionalGeneration
from transformers.models.internvl.modeling_internvl import InternVLVisionAttention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from ds_lvx.models.concatenated.batch import Arrange, Unit
from ds_lvx.models.concatenated.family import Concatenated
from ds_lvx.models.concatenated.forward import Encoded
from ds_lvx.models.internvl import batch as batches
from ds_lvx.models.internvl import dimensions, sized
from ds_lvx.models.internvl.processor import Processor
from ds_lvx.models.visual import PIXELS

_OF_TEXT: Mapping[str, type[nn.Module]] = {
    "qwen2": Qwen2Attention,
    "qwen3": Qwen3Attention,
    "llama": LlamaAttention,
}
"""By the type of the text model."""


class InternVL(Concatenated):
    """See `ds_lvx.models.contract.Family` and `Concatenated` for what each part does."""

    keys = (PIXELS,)
    patterns: Mapping[str, str] = {"local": "*vision_tower*", "self": "*language_model*.self_attn"}
    of_text = tuple(_OF_TEXT.values())
    within = InternVLVisionAttention
    sources = (PIXELS,)
    takes = (PIXELS,)
    sized = sized
    of_class = InternVLForConditionalGeneration

    # ---- patching

    def check(self, model: Any, *, sp_size: int) -> None:
        super().check(model, sp_size=sp_size)
        batches.tile_tokens(model.config)
        kind = model.config.text_config.model_type
        if kind not in _OF_TEXT:
            raise NotImplementedError(
                f"got a text model of type {kind!r}; expected one of {', '.join(_OF_TEXT)}, whose "
                "attention is known here"
            )

    @staticmethod
    def encode(module: Any, given: Mapping[str, Any]) -> Encoded:
        made = module.get_image_features(given[PIXELS], return_dict=True)
        return Encoded(made.pooler_output.flatten(0, 1))

    # ---- batches

    def units(self, batch: Mapping[str, Any], ids: Tensor, config: Any) -> list[Unit]:
        return batches.units(ids, config)

    def visual_tokens(self, ids: Tensor, config: Any) -> Tensor:
        return ids == config.image_token_id

    def pixels(self, batch: Mapping[str, Any], config: Any) -> dict[str, Tensor]:
        given = super().pixels(batch, config)
        for pixels in given.values():
            batches.check_pixels(pixels, config)
        return given

    def arrange(self, config: Any) -> Arrange:
        return batches.arrange

    def blank(self, model: Any) -> dict[str, Tensor]:
        return batches.blank(model.config)

    # ---- data

    def load_processor(self, name: str) -> Processor:
        return Processor.of(name, AutoConfig.from_pretrained(name))

    # ---- models

    def vision_tower(self, model: Any) -> Any:
        return model.model.vision_tower

    dimensions = staticmethod(dimensions.dimensions)
    frame_tokens = staticmethod(batches.tile_tokens)
