"""SmolVLM and Idefics3: which modules attend, what their units are, and how their tower runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    Idefics3ForConditionalGeneration,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionAttention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionAttention

from ds_lvx.models.concatenated.batch import Arrange, Unit
from ds_lvx.models.concatenated.family import Concatenated
from ds_lvx.models.concatenated.forward import Encoded
from ds_lvx.models.smolvlm import batch as batches
from ds_lvx.models.smolvlm import dimensions, sized
from ds_lvx.models.smolvlm.processor import Processor
from ds_lvx.models.visual import PIXELS


class SmolVLM(Concatenated):
    """See `ds_lvx.models.contract.Family` and `Concatenated` for what each part does."""

    keys = (PIXELS, batches.MASK)
    patterns: Mapping[str, str] = {"local": "*vision_model*", "self": "*text_model*.self_attn"}
    text_name = "text_model"
    lora_targets = r".*text_model.*\.(q_proj|k_proj|v_proj|o_proj)"
    of_text = LlamaAttention
    within: type[nn.Module] = SmolVLMVisionAttention
    sources = (PIXELS,)
    takes = (PIXELS,)
    sized: sized.Sizes = sized.SMOLVLM
    of_class: Any = SmolVLMForConditionalGeneration

    # ---- patching

    def check(self, model: Any, *, sp_size: int) -> None:
        super().check(model, sp_size=sp_size)
        batches.tile_tokens(model.config)
        kind = model.config.text_config.model_type
        if kind != "llama":
            raise NotImplementedError(
                f"got a text model of type {kind!r}; expected 'llama', as the published models "
                "have it, whose attention is known here"
            )

    @staticmethod
    def encode(module: Any, given: Mapping[str, Any]) -> Encoded:
        tower, pixels = module.vision_model, given[PIXELS].to(module.dtype)
        sides = (side // tower.patch_size for side in pixels.shape[2:])
        whole = torch.ones(len(pixels), *sides, dtype=torch.bool, device=pixels.device)
        # Its own forward makes a mask of this, and waits for the device to see that all is True.
        states = tower.embeddings(pixels, patch_attention_mask=whole)
        states = tower.post_layernorm(tower.encoder(states).last_hidden_state)
        return Encoded(module.connector(states).flatten(0, 1))

    # ---- batches

    def units(self, batch: Mapping[str, Any], ids: Tensor, config: Any) -> list[Unit]:
        return batches.units(ids, config)

    def visual_tokens(self, ids: Tensor, config: Any) -> Tensor:
        return ids == config.image_token_id

    def pixels(self, batch: Mapping[str, Any], config: Any) -> dict[str, Tensor]:
        given = super().pixels(batch, config)
        mask = batch.get(batches.MASK)
        return {key: batches.tiles(each, mask, config) for key, each in given.items()}

    def arrange(self, config: Any) -> Arrange:
        return batches.arrange

    def blank(self, model: Any) -> dict[str, Tensor]:
        return batches.blank(model.config)

    # ---- data

    def load_processor(self, name: str) -> Processor:
        return Processor.of(name, AutoConfig.from_pretrained(name))

    # ---- models

    def regions(self) -> Mapping[str, str]:
        parts = r".*\bvision_model\.(embeddings|encoder|post_layernorm)"
        return {**super().regions(), parts: "vision"}

    def vision_tower(self, model: Any) -> Any:
        return model.model.vision_model

    dimensions = staticmethod(dimensions.dimensions)
    frame_tokens = staticmethod(batches.tile_tokens)


class Idefics3(SmolVLM):
    """The same model, of another class."""

    within = Idefics3VisionAttention
    sized = sized.IDEFICS3
    of_class = Idefics3ForConditionalGeneration
