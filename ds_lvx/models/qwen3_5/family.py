"""Qwen3.5: Qwen3-VL's pictures among a text of which three layers in four carry a state along it.

Those are Gated DeltaNet, whose heads travel; in the others ds_lvx's methods run as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5Attention,
    Qwen3_5GatedDeltaNet,
    Qwen3_5Model,
    Qwen3_5VisionAttention,
)

from ds_lvx.models.qwen3_5 import dimensions, sized
from ds_lvx.models.qwen3_5.states import OfStates
from ds_lvx.models.qwen3_vl.family import Qwen3VL


class Qwen35(OfStates, Qwen3VL):
    """See `ds_lvx.models.contract.Family` and `Concatenated` for what each part does; what is not
    here is as of Qwen3-VL."""

    deep = False
    lora_targets = (
        r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|in_proj_qkv|in_proj_z|out_proj)"
    )
    of_text: type[nn.Module] = Qwen3_5Attention
    of_states: type[nn.Module] = Qwen3_5GatedDeltaNet
    within: type[nn.Module] = Qwen3_5VisionAttention
    sized = sized
    of_class: Any = Qwen3_5ForConditionalGeneration
    of_positions: Any = Qwen3_5Model

    def regions(self) -> Mapping[str, str]:
        found = super().regions()
        return {rf".*\b{self.text_name}\.layers\.\d+\.linear_attn": "text", **found}

    dimensions = staticmethod(dimensions.dimensions)
