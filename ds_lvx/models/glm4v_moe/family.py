"""GLM-4.5V and GLM-4.6V: GLM-4.1V with a mixture of experts, of which one serves every token.

Experts are chosen with a bias that no gradient moves, a buffer; the first layers have none.
"""

from __future__ import annotations

from transformers import Glm4vMoeForConditionalGeneration
from transformers.models.glm4v_moe.modeling_glm4v_moe import (
    Glm4vMoeModel,
    Glm4vMoeTextAttention,
    Glm4vMoeTextExperts,
    Glm4vMoeVisionAttention,
)

from ds_lvx.models.glm4v.family import Glm4V
from ds_lvx.models.glm4v_moe import dimensions, sized
from ds_lvx.models.qwen3_vl_moe.experts import OfExperts


class Glm4vMoe(OfExperts, Glm4V):
    """See `ds_lvx.models.contract.Family` and `Concatenated` for what each part does; what is not
    here is as of GLM-4.1V."""

    of_text = Glm4vMoeTextAttention
    within = Glm4vMoeVisionAttention
    of_experts = Glm4vMoeTextExperts
    sized = sized
    of_class = Glm4vMoeForConditionalGeneration
    of_positions = Glm4vMoeModel

    dimensions = staticmethod(dimensions.dimensions)
