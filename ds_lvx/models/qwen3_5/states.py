"""Families whose text carries a state along in some of its layers, and attends in the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.concatenated.family import Concatenated
from ds_lvx.models.cuts import span
from ds_lvx.models.layers import Layer, LayerPlan
from ds_lvx.models.patch import PatchedAttention
from ds_lvx.models.qwen3_5.delta import DeltaForward

_FULL, _LINEAR = "full_attention", "linear_attention"


class OfStates(Concatenated):
    """Base of these families.

    Attributes:
        of_states: class of a layer's module that carries a state, a ``GatedDeltaNet``.
    """

    of_states: type[nn.Module]
    layer_types = (_FULL, _LINEAR)
    unbroken = True

    # ---- patching

    def attention_layers(self, model: Any) -> list[Layer]:
        attending = {layer.name: layer for layer in super().attention_layers(model)}
        return [
            attending.get(name) or _layer(name, module)
            for name, module in model.named_modules()
            if name in attending or isinstance(module, self.of_states)
        ]

    def forward(self, layer: Layer, plan: LayerPlan) -> PatchedAttention:
        if layer.kind == "recurrent":
            return DeltaForward(layer.module, plan)
        return super().forward(layer, plan)

    def prepare(self, batch: ShardedBatch, arguments: Mapping[str, Any]) -> dict[str, Any]:
        given = super().prepare(batch, arguments)
        mask: Tensor | None = arguments.get("attention_mask")
        if batch.decoding is not None and mask is not None:
            mask = _of_forward(batch, mask, arguments["inputs_embeds"].shape[1])
        return {**given, "attention_mask": {_FULL: given["attention_mask"], _LINEAR: mask}}


def _layer(name: str, module: Any) -> Layer:
    return Layer(
        name,
        "recurrent",
        module,
        num_heads=module.num_v_heads,
        num_kv_heads=module.num_k_heads,
        head_dim=module.head_v_dim,
        features_dim=module.hidden_size,
    )


def _of_forward(batch: ShardedBatch, mask: Tensor, tokens: int) -> Tensor | None:
    """The mask of the tokens that a rank runs in a forward of generation.

    Args:
        batch: the keyword.
        mask: ``[R, t]`` of all of the text so far, or of the rank's part of a prompt.
        tokens: of the rank.
    """
    if batch.split and batch.past > 0:
        here = span(batch.text_lengths, batch.channel.rank)
        return mask[:, batch.past + here.start : batch.past + here.stop]
    # A token that is chosen is none of padding.
    return mask[:, -tokens:] if batch.split or tokens > 1 else None
