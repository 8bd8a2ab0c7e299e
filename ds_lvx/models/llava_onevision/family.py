"""LLaVA-OneVision: which modules attend, what its units are, and how its tower runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.siglip.modeling_siglip import SiglipAttention

from ds_lvx.models.batch import Text
from ds_lvx.models.concatenated.batch import Unit, Units
from ds_lvx.models.concatenated.family import Concatenated
from ds_lvx.models.concatenated.forward import Encoded
from ds_lvx.models.concatenated.sized import Sized
from ds_lvx.models.dimensions import Model
from ds_lvx.models.llava_onevision import batch as batches
from ds_lvx.models.llava_onevision import dimensions, sized
from ds_lvx.models.llava_onevision.processor import Processor
from ds_lvx.models.visual import PIXELS, Visual

_KINDS = ("qwen2", "siglip_vision_model")


class LlavaOnevision(Concatenated):
    """See `ds_lvx.models.contract.Family` and `Concatenated` for what each part does."""

    keys = (
        PIXELS,
        batches.SIZES,
        batches.COUNTS,
        batches.VIDEO_PIXELS,
        batches.VIDEO_SIZES,
    )
    patterns: Mapping[str, str] = {"local": "*vision_tower*", "self": "*language_model*.self_attn"}
    of_text = Qwen2Attention
    within = SiglipAttention
    sources = (PIXELS, batches.VIDEO_PIXELS)
    takes = (PIXELS, batches.SIZES)
    sized: Sized = sized

    # ---- patching

    def find(self, model: nn.Module) -> LlavaOnevisionForConditionalGeneration | None:
        kind = LlavaOnevisionForConditionalGeneration
        return next((m for m in model.modules() if isinstance(m, kind)), None)

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
        units = given[batches.SIZES].tolist()
        features, newline = _tiles(module, given[PIXELS])
        aspect, parts, start = module.config.vision_aspect_ratio, [], 0
        for framed, group in groupby(units, key=lambda unit: unit[0] == 0):
            here = [*group]
            counts = [max(tiles, 1) for tiles, *_ in here]
            held = features[start : start + sum(counts)]
            start += sum(counts)
            if framed:
                for frame, (_, last, _) in zip(module.apply_pooling(held), here, strict=True):
                    parts += [frame, newline[None]] if last else [frame]
            else:
                sizes, images = [size for _, *size in here], held.split(counts)
                parts += module.pack_image_features(images, sizes, newline, aspect)[0]
        return Encoded(torch.cat(parts))

    # ---- batches

    def units(self, batch: Mapping[str, Any], ids: Tensor, config: Any) -> list[Unit]:
        return batches.units(batch, ids, config)

    def visual_tokens(self, ids: Tensor, config: Any) -> Tensor:
        return batches.token_types(ids, config) > 0

    def visual(self, batch: Mapping[str, Any], text: Text, model: Any) -> Visual:
        pixels = batches.pixels(self.pixels(batch), model.config)
        return Units.of(text, pixels, self.arrange)

    @staticmethod
    def arrange(units: Sequence[Unit], rows: Sequence[Tensor]) -> dict[str, Tensor]:
        return batches.arrange(units, rows)

    def blank(self, model: Any) -> dict[str, Tensor]:
        return batches.blank(model.config)

    # ---- data

    def load_processor(self, name: str) -> Processor:
        return Processor.of(name)

    def media_tokens(self, processor: Processor) -> tuple[str, ...]:
        return (processor.image_token, processor.video_token)

    # ---- models

    def vision_tower(self, model: Any) -> Any:
        return model.model.vision_tower

    def dimensions(self, config: Mapping[str, Any], name: str, source: str) -> Model:
        return dimensions.dimensions(config, name, source)

    def frame_tokens(self, config: Any) -> int:
        return batches.frame_tokens(config)


def _tiles(module: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features of tiles ``[tiles, P^2, hidden]``, and the newline's ``[hidden]``.

    The model's own way with several images of one sample, each of which is one tile and a newline.
    """
    sizes = [pixels.shape[-2:]] * len(pixels)
    made = module.get_image_features(
        pixels, sizes, batch_num_images=[len(pixels) + 1], return_dict=True
    )
    whole = torch.stack(made.pooler_output)
    return whole[:, :-1], whole[0, -1]
