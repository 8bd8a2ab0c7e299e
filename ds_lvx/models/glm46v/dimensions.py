"""GLM-4.6V's classes for the planner: those of what is inside. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_lvx.models.dimensions import Model
from ds_lvx.models.glm4v import dimensions as dense
from ds_lvx.models.glm4v_moe import dimensions as mixture


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`."""
    has_experts = "moe_intermediate_size" in config["text_config"]
    return (mixture if has_experts else dense).dimensions(config, name, source)


def known() -> tuple[Model, ...]:
    """None: published models have GLM-4.1V's type or GLM-4.5V's."""
    return ()
