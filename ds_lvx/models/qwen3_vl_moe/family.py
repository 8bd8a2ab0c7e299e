"""Qwen3-VL with a mixture of experts: each token of the text goes through a few of a layer's MLPs.

A rank routes its own tokens, and has all experts, as ZeRO shares them; nothing more is sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Qwen3VLMoeForConditionalGeneration
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoeModel,
    Qwen3VLMoeTextAttention,
    Qwen3VLMoeTextExperts,
    Qwen3VLMoeVisionAttention,
)

from ds_lvx.models.dimensions import Model
from ds_lvx.models.layers import LayerPlan
from ds_lvx.models.qwen3_vl.family import Qwen3VL
from ds_lvx.models.qwen3_vl_moe import dimensions, sized
from ds_lvx.models.qwen3_vl_moe.checkpoint import fit_experts, fit_loaded_experts
from ds_lvx.models.qwen3_vl_moe.experts import ROUTERS, EmbedOfExperts, OneForZero, router_loss


class Qwen3VLMoe(Qwen3VL):
    """See `ds_lvx.models.contract.Family` and `Concatenated` for what each part does; what is not
    here is as of Qwen3-VL."""

    of_text = Qwen3VLMoeTextAttention
    within = Qwen3VLMoeVisionAttention
    sized = sized
    of_class = Qwen3VLMoeForConditionalGeneration
    of_positions = Qwen3VLMoeModel
    embed = EmbedOfExperts

    def check(self, model: Any, *, sp_size: int) -> None:
        super().check(model, sp_size=sp_size)
        if getattr(model.config.text_config, ROUTERS):
            raise router_loss("a text model")

    def install(self, model: Any, plans: Sequence[LayerPlan]) -> None:
        super().install(model, plans)
        fit_experts(self.model_type)  # for saving a model that was not loaded here
        fit_loaded_experts(model)
        for module in self.text_model(model).modules():
            if isinstance(module, Qwen3VLMoeTextExperts):
                module.register_forward_pre_hook(OneForZero(module))

    def load(
        self, name: str, dtype: torch.dtype, *, trust_remote_code: bool = False, **more: Any
    ) -> Any:
        fit_experts(self.model_type)
        return super().load(name, dtype, trust_remote_code=trust_remote_code, **more)

    def dimensions(self, config: Mapping[str, Any], name: str, source: str) -> Model:
        return dimensions.dimensions(config, name, source)
