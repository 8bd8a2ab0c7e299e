"""GLM-4.6V's classes: text and tower are GLM-4.1V's, or GLM-4.5V's with its experts; times are
written otherwise."""

from __future__ import annotations

from typing import Any

from transformers import Glm46VForConditionalGeneration
from transformers.models.glm4v.modeling_glm4v import (
    Glm4vTextAttention,
    Glm4vTextModel,
    Glm4vVisionAttention,
    Glm4vVisionModel,
)
from transformers.models.glm4v_moe.modeling_glm4v_moe import (
    Glm4vMoeTextAttention,
    Glm4vMoeTextExperts,
    Glm4vMoeTextModel,
    Glm4vMoeVisionAttention,
    Glm4vMoeVisionModel,
)
from transformers.models.glm46v.modeling_glm46v import Glm46VModel

from ds_lvx.models.glm4v.family import Glm4V
from ds_lvx.models.glm4v.processor import Tenths
from ds_lvx.models.glm46v import dimensions, sized
from ds_lvx.models.qwen3_vl_moe.experts import OfExperts


class Glm46V(OfExperts, Glm4V):
    """See `ds_lvx.models.contract.Family` and `Concatenated` for what each part does; what is not
    here is as of GLM-4.1V."""

    of_text = (Glm4vTextAttention, Glm4vMoeTextAttention)
    within = (Glm4vVisionAttention, Glm4vMoeVisionAttention)
    of_experts = Glm4vMoeTextExperts
    sized = sized
    of_class = Glm46VForConditionalGeneration
    of_positions = Glm46VModel

    load_processor = staticmethod(Tenths.of)
    dimensions = staticmethod(dimensions.dimensions)

    def check(self, model: Any, *, sp_size: int) -> None:
        parts = {"text": self.text_model(model), "tower": self.vision_tower(model)}
        for name, kinds in (
            ("text", (Glm4vTextModel, Glm4vMoeTextModel)),
            ("tower", (Glm4vVisionModel, Glm4vMoeVisionModel)),
        ):
            if not isinstance(parts[name], kinds):
                raise NotImplementedError(
                    f"got a {type(model).__name__} whose {name} is a {type(parts[name]).__name__}; "
                    f"expected a {' or a '.join(kind.__name__ for kind in kinds)}"
                )
        super().check(model, sp_size=sp_size)
