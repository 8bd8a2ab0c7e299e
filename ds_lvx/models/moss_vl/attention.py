"""MOSS-VL's attention on this rank's shards.

The model's layers hand no keyword on to their attention but the mask; and transformers checkpoints
a layer's forward, so that no hook runs again with it. What attention must know of a sharded batch
therefore travels with the mask, of which nothing else is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from ds_lvx.attention.projection import Placed
from ds_lvx.models.attend import attend
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.layers import Layer, LayerPlan
from ds_lvx.models.patch import (
    KEYWORD,
    ShardedForward,
    fill,
    heads,
    refuse_dropout,
    trains,
)
from ds_lvx.models.rotary import rotated

ROTARY = "ds_lvx_frame_rotary"
"""Cosines and sines of this rank's visual tokens: a keyword of the text model. A token that is
chosen finds keys that are turned already, and has none."""


def mask_of(batch: ShardedBatch, arguments: Mapping[str, Any]) -> Tensor:
    """The mask that carries a sharded batch.

    Args:
        batch: the keyword.
        arguments: of the text model.
    """
    # Four dimensions stop transformers from building a mask of [s, s]; nobody reads the number.
    mask: Any = arguments["inputs_embeds"].new_zeros(1, 1, 1, 1)
    mask.ds_lvx, mask.rotary = batch, arguments.get(ROTARY)
    return cast(Tensor, mask)


class Attention(ShardedForward):
    """Self- and cross-attention: norm, then rotary embedding, of q and k.

    Args:
        layer: with a module that has ``q_norm`` and ``k_norm`` over the dimensions of a head.
        plan: how it runs.
    """

    def __init__(self, layer: Layer, plan: LayerPlan) -> None:
        super().__init__(layer.module, plan)
        self.kv_heads = layer.num_kv_heads

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = getattr(kwargs.get("attention_mask"), KEYWORD, None)
        return super().__call__(*args, ds_lvx=batch, **kwargs)

    def sharded(self, batch: ShardedBatch, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Attention of this rank's text over itself, or over the visual tokens of all ranks."""
        x = kwargs["hidden_states"]
        if self.plan.kind == "self":
            rotary = kwargs["position_embeddings"]
            cache = kwargs.get("past_key_values")
            return self._attend(batch, x, x, of_queries=rotary, of_keys=rotary, cache=cache)
        return self._attend(
            batch,
            x,
            kwargs["cross_attention_states"],
            of_queries=kwargs["query_position_embeddings"],
            of_keys=kwargs["attention_mask"].rotary,
        )

    def _attend(
        self,
        batch: ShardedBatch,
        x: Tensor,
        source: Tensor,
        *,
        of_queries: tuple[Tensor, Tensor],
        of_keys: tuple[Tensor, Tensor],
        cache: Any = None,
    ) -> tuple[Tensor, None]:
        module = self.module
        refuse_dropout(module.attention_dropout if module.training else 0.0)

        def projected(linear: nn.Module, norm: nn.Module, y: Tensor, rotary: Any) -> Tensor:
            plain = heads(linear(y), module.head_dim)
            # Under autocast the norm's fp32 weight widens it; SDPA would have narrowed it again.
            return rotated(norm(plain).to(plain.dtype), *rotary)

        def project_kv(features: Tensor, tokens: slice) -> tuple[Tensor, Tensor]:
            # Looked up at every call: LoRA and ZeRO-3 act on the modules' own calls.
            rotary = [part[:, tokens] for part in of_keys]
            k = projected(module.k_proj, module.k_norm, features, rotary)
            keys = k, heads(module.v_proj(features), module.head_dim)
            if cache is None:
                return keys
            return fill(batch, cache, keys, layer=module.layer_idx)

        out = attend(
            self.plan,
            batch,
            projected(module.q_proj, module.q_norm, x, of_queries),
            features=source,
            project_kv=Placed(project_kv),
            trains=trains(module.k_proj, module.v_proj, module.k_norm),
            kv_heads=self.kv_heads,
            scale=module.scaling,
        )
        return module.o_proj(out.flatten(2)), None
