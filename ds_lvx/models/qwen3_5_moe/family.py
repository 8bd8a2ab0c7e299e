"""Qwen3.5 with a mixture of experts in each layer of the text, of which one serves every token."""

from __future__ import annotations

from transformers import Qwen3_5MoeForConditionalGeneration
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeAttention,
    Qwen3_5MoeExperts,
    Qwen3_5MoeGatedDeltaNet,
    Qwen3_5MoeModel,
    Qwen3_5MoeVisionAttention,
)

from ds_lvx.models.qwen3_5.family import Qwen35
from ds_lvx.models.qwen3_5_moe import dimensions, sized
from ds_lvx.models.qwen3_vl_moe.experts import OfExperts


class Qwen35Moe(OfExperts, Qwen35):
    """See `ds_lvx.models.contract.Family` and `Concatenated` for what each part does; what is not
    here is as of Qwen3.5."""

    of_text = Qwen3_5MoeAttention
    of_states = Qwen3_5MoeGatedDeltaNet
    of_experts = Qwen3_5MoeExperts
    within = Qwen3_5MoeVisionAttention
    sized = sized
    of_class = Qwen3_5MoeForConditionalGeneration
    of_positions = Qwen3_5MoeModel

    dimensions = staticmethod(dimensions.dimensions)
