"""GLM-4.5V with random weights, cut to any size; a tiny one to try out, frames to measure with.

All layers of the text see images; the first has one MLP, as wide as what a token goes through in
the others. A frame that is measured is GLM-4.1V's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import Glm4vMoeConfig

from ds_lvx.models.glm4v import sized as glm
from ds_lvx.models.glm4v.processor import Processor
from ds_lvx.models.glm4v_moe.dimensions import known
from ds_lvx.models.random_weights import of_heads, size_of_known, size_of_parts
from ds_lvx.models.size import Size

random_frames = glm.random_frames
frame_tokens = glm.frame_tokens
_IDS = (*range(151_339, 151_343), 151_363, 151_364)
_DENSE, _SHARED = "first_k_dense_replace", "n_shared_experts"


def config_of(size: Size, ids: tuple[int, ...] | None = None) -> Glm4vMoeConfig:
    """The configuration of a model cut to a size.

    Args:
        size: its dimensions, ``mlp`` an expert's; ``cross_at`` says nothing here.
        ids: see `ds_lvx.models.glm4v.sized.config_of`.
    """
    text = {
        **glm.rotated_text(size),
        "head_dim": size.head_dim or size.hidden // size.heads,
        "intermediate_size": size.mlp * size.chosen_experts,
        "moe_intermediate_size": size.mlp,
        "n_routed_experts": size.experts,
        "num_experts_per_tok": size.chosen_experts,
        _SHARED: 1,
        _DENSE: min(1, size.layers - 1),
    }
    return Glm4vMoeConfig(text_config=text, **glm.all_but_text(size, ids, _IDS))


def size_of(config: Any) -> Size:
    """The size of a configuration; None is GLM-4.5V's.

    Raises:
        NotImplementedError: not one layer of the text has no experts, or a token does not go
            through one of them always.
    """
    if config is None:
        experts = {"mlp": 1408, "experts": 128, "chosen_experts": 8, "vision_mlp": 10_944}
        return size_of_known(known(), "GLM-4.5V", positions=65_536, image_size=336, **experts)
    text = config.text_config
    dense, shared = text.first_k_dense_replace, text.n_shared_experts
    if (dense, shared) != (min(1, text.num_hidden_layers - 1), 1):
        raise NotImplementedError(
            f"got a text model with {_DENSE} {dense} and {_SHARED} {shared}; expected 1 and 1, as "
            "the published models have them: a model with random weights is made so"
        )
    return replace(
        size_of_parts(text, config.vision_config, **of_heads(text)),
        mlp=text.moe_intermediate_size,
        experts=text.n_routed_experts,
        chosen_experts=text.num_experts_per_tok,
    )


def tiny() -> tuple[Glm4vMoeConfig, Processor]:
    """A model of about 200,000 parameters, and its processor: pictures have 2 to 8 tokens."""
    size, ids, processor = glm.tiny_parts(Processor)
    return config_of(replace(size, mlp=24, experts=4, chosen_experts=2), ids), processor
