"""LLaVA-OneVision: which modules attend, what its units are, and how its tower runs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, LlavaOnevisionForConditionalGeneration
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.siglip.modeling_siglip import SiglipAttention

from ds_lvx.models.concatenated.batch import Arrange
from ds_lvx.models.concatenated.family import Concatenated
from ds_lvx.models.concatenated.forward import Encoded
from ds_lvx.models.llava_onevision import batch as batches
from ds_lvx.models.llava_onevision import dimensions, sized
from ds_lvx.models.llava_onevision.forward import encoded, packed
from ds_lvx.models.llava_onevision.processor import Processor
from ds_lvx.models.visual import PIXELS

_KINDS = ("qwen2", "siglip_vision_model")


class LlavaOnevision(Concatenated):
    """See `ds_lvx.models.contract.Family` and `Concatenated` for what each part does."""

    keys = (
        PIXELS,
        batches.SIZES,
        batches.COUNTS,
        batches.VIDEO_PIXELS,
        batches.VIDEO_SIZES,
        batches.FRAMES,
    )
    patterns: Mapping[str, str] = {"local": "*vision_tower*", "self": "*language_model*.self_attn"}
    of_text = Qwen2Attention
    within = SiglipAttention
    sources = (PIXELS, batches.VIDEO_PIXELS)
    takes = (PIXELS, batches.SIZES)
    sized = sized
    of_class = LlavaOnevisionForConditionalGeneration

    # ---- patching

    def check(self, model: Any, *, sp_size: int) -> None:
        super().check(model, sp_size=sp_size)
        config = model.config
        found = (config.text_config.model_type, config.vision_config.model_type)
        if found != _KINDS or config.vision_feature_select_strategy != "full":
            raise NotImplementedError(
                f"got a text model and a tower of types {found}, of which "
                f"{config.vision_feature_select_strategy!r} patches are taken; expected {_KINDS} "
                "and 'full', as the published models have it"
            )

    @staticmethod
    def encode(module: Any, given: Mapping[str, Any]) -> Encoded:
        units = given[batches.SIZES]
        features, start = encoded(module, given[PIXELS]), 0
        newline = module.image_newline.to(features)
        parts = [newline[None][:0]]  # where no unit has one: a gradient of 0, and not none
        for framed, group in groupby(units, key=lambda unit: unit[0] == 0):
            here = [*group]
            counts = [max(tiles, 1) for tiles, *_ in here]
            held = features[start : start + sum(counts)]
            start += sum(counts)
            if framed:
                for frame, (_, last, _) in zip(module.apply_pooling(held), here, strict=True):
                    parts += [frame, newline[None]] if last else [frame]
            else:
                images = zip(held.split(counts), here, strict=True)
                parts += [packed(module, image, size) for image, (_, *size) in images]
        return Encoded(torch.cat(parts))

    # ---- batches

    units = staticmethod(batches.units)

    def visual_tokens(self, ids: Tensor, config: Any) -> Tensor:
        return batches.token_types(ids, config) > 0

    def pixels(self, batch: Mapping[str, Any], config: Any) -> dict[str, Tensor]:
        return batches.pixels(super().pixels(batch, config), config)

    def arrange(self, config: Any) -> Arrange:
        return batches.arrange

    def blank(self, model: Any) -> dict[str, Any]:
        return batches.blank(model.config)

    # ---- data

    def load_processor(self, name: str) -> Processor:
        return Processor.of(name, AutoConfig.from_pretrained(name))

    def media_tokens(self, processor: Processor) -> tuple[str, ...]:
        return (processor.image_token, processor.video_token)

    # ---- models

    def vision_tower(self, model: Any) -> Any:
        return model.model.vision_tower

    dimensions = staticmethod(dimensions.dimensions)
    frame_tokens = staticmethod(batches.frame_tokens)
