"""One rule of the `ds_lvx` section: its keys, and the words that each of them takes."""

from typing import Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from ds_lvx.config.registry import kernel_words, method_words, schedule_words

Features: TypeAlias = Literal["keep", "offload"]
Across: TypeAlias = Literal["auto", "ring", "lvx"]
WORDS: dict[str, tuple[str, ...]] = {
    "method": method_words(),
    "schedule": schedule_words(),
    "kernel": kernel_words(),
    "across": get_args(Across),
    "features": get_args(Features),
}
"""The words of each key that takes words."""


class LayerRule(BaseModel):
    """How the attention layers whose name matches a pattern run."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )

    match: str = Field(min_length=1)
    """Shell pattern on the layer's qualified module name, e.g. `*.cross_attn`; `*` crosses dots."""

    method: str
    """Who computes the layer: `lvx`, `ring`, `ulysses`, `hybrid` (ulysses inside subgroups of
    ranks, ring or lvx across), `none` (this rank alone) or `auto`: what the planner predicts to be
    fastest for the batch at hand, but no hybrid; with `recompute_kv`, that is lvx."""

    schedule: str = "auto"
    """How lvx moves the queries: `ring`, `gather`, `replicated` or `auto`, the planner's choice."""

    ulysses: int | None = Field(default=None, ge=1)
    """Adjacent ranks of a `hybrid`'s subgroup, which share the heads: those of a node, say."""

    across: Across = "auto"
    """What runs across a `hybrid`'s subgroups: `ring`, `lvx` or `auto`, which is lvx in
    cross-attention and ring elsewhere."""

    recompute_kv: bool = False
    """Project K and V again in backward instead of keeping them (lvx only)."""

    features: Features = "keep"
    """Where the visual features wait between layers: `keep` (on the device) or `offload`, pinned
    host memory, from which every layer streams them under its projection. Needs `recompute_kv`."""

    kv_chunk_tokens: int | None = Field(default=None, ge=1)
    """Project and attend K and V of so many visual tokens at a time, forward and backward, so that
    a layer's K and V never exist whole. Needs `recompute_kv`."""

    kernel: str = "auto"
    """Who computes one block on one device: `native`, `flash`, `cudnn`, `triton`,
    `triton_atomic`, `reference` or `auto`."""

    @field_validator("method", "schedule", "kernel")
    @classmethod
    def _is_known(cls, word: str, info: ValidationInfo) -> str:
        if word not in WORDS[str(info.field_name)]:
            raise PydanticCustomError("literal_error", "an unknown word")
        return word
