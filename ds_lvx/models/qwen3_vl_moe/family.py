"""Qwen3-VL with a mixture of experts: each token of the text goes through a few of a layer's MLPs.

A rank routes its own tokens, and has all experts, as ZeRO shares them; nothing more is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Qwen3VLMoeForConditionalGeneration
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoeModel,
    Qwen3VLMoeTextAttention,
    Qwen3VLMoeTextExperts,
    Qwen3VLMoeVisionAttention,
)

from ds_lvx.models.layers import LayerPlan
from ds_lvx.models.qwen3_vl.family import Qwen3VL
from ds_lvx.models.qwen3_vl_moe import dimensions, sized
from ds_lvx.models.qwen3_vl_moe.checkpoint import fit_experts, fit_loaded_experts
from ds_lvx.models.qwen3_vl_moe.experts import OfExperts


class Qwen3VLMoe(OfExperts, Qwen3VL):
    """See `ds_lvx.models.contract.Family` and `Concatenated` for what each part does; what is not
    here is as of Qwen3-VL."""

    of_text = Qwen3VLMoeTextAttention
    within = Qwen3VLMoeVisionAttention
    of_experts = Qwen3VLMoeTextExperts
    sized = sized
    of_class = Qwen3VLMoeForConditionalGeneration
    of_positions = Qwen3VLMoeModel

    def install(self, model: Any, plans: Sequence[LayerPlan]) -> None:
        super().install(model, plans)
        fit_experts(self.model_type)  # for saving a model that was not loaded here
        fit_loaded_experts(model)

    def load(
        self, name: str, dtype: torch.dtype, *, trust_remote_code: bool = False, **more: Any
    ) -> Any:
        fit_experts(self.model_type)
        return super().load(name, dtype, trust_remote_code=trust_remote_code, **more)

    dimensions = staticmethod(dimensions.dimensions)
