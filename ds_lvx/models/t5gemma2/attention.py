"""T5Gemma2's attention on this rank's shards.

In the encoder, text and images attend to each other. In the decoder there is one softmax over the
text so far and all that the encoder made: the attention to each is a part, merged by lse. Keys of
the encoder have the same projections as those of the text, and no rotary embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.models.t5gemma2.modeling_t5gemma2 import apply_rotary_pos_emb

from ds_lvx.attention.layout import Layout
from ds_lvx.attention.merge import merged
from ds_lvx.kernels.rule import Rule
from ds_lvx.models.attend import attend, attend_part
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.cached import Cached
from ds_lvx.models.layers import Layer, LayerPlan
from ds_lvx.models.patch import ShardedForward, heads, refuse_dropout, trains
from ds_lvx.models.t5gemma2.batch import decoder_layout, encoder_layout

Rotary = tuple[Tensor, Tensor]


class _Attention(ShardedForward):
    """What both have in common.

    Args:
        layer: an attention module.
        plan: how it runs.
    """

    def __init__(self, layer: Layer, plan: LayerPlan) -> None:
        super().__init__(layer.module, plan)
        self.kv_heads, self.head_dim = layer.num_kv_heads, layer.head_dim

    def _queries(self, x: Tensor, rotary: Rotary) -> Tensor:
        """``[B, s, H, D]`` of states ``[B, s, hidden]``."""
        module = self.module
        refuse_dropout(module.attention_dropout if module.training else 0.0)
        return _rotated(module.q_norm(heads(module.q_proj(x), self.head_dim)), rotary)

    def _keys(self, x: Tensor, rotary: Rotary | None) -> dict[str, Any]:
        """What `attend` wants to know of keys that are made of states ``[B, t, hidden]``."""
        module = self.module

        def project(features: Tensor) -> tuple[Tensor, Tensor]:
            # Looked up at every call: LoRA and ZeRO-3 act on the modules' own calls.
            k = module.k_norm(heads(module.k_proj(features), self.head_dim))
            v = heads(module.v_proj(features), self.head_dim)
            return k if rotary is None else _rotated(k, rotary), v

        return {
            "features": x,
            "project_kv": project,
            "trains": trains(module.k_proj, module.v_proj, module.k_norm),
            "kv_heads": self.kv_heads,
            "scale": module.scaling,
        }


class EncoderAttention(_Attention):
    """`T5Gemma2SelfAttention`: every token sees all, or those of a window around it."""

    def sharded(
        self,
        batch: ShardedBatch,
        hidden_states: Tensor,
        position_embeddings: Rotary,
        **_unused: Any,
    ) -> tuple[Tensor, None]:
        """Attention of this rank's part of the encoder's rows, ``[B, n_r, hidden]``."""
        own = replace(batch, text=encoder_layout(batch, self.module.layer_type))
        q = self._queries(hidden_states, position_embeddings)
        out = attend(self.plan, own, q, **self._keys(hidden_states, position_embeddings))
        return self.module.o_proj(out.flatten(2)), None


class MergedAttention(_Attention):
    """`T5Gemma2MergedAttention`: of the decoder's text to itself and to the encoder's rows.

    Args:
        layer: as of the base.
        plan: how it attends to the encoder's rows; the text's own keys, few and with few heads, go
            by ring attention.
    """

    def __init__(self, layer: Layer, plan: LayerPlan) -> None:
        super().__init__(layer, plan)
        method = "none" if plan.method == "none" else "ring"
        self.text_plan = LayerPlan(plan.name, "self", method, "auto", plan.kernel, False)

    def sharded(
        self,
        batch: ShardedBatch,
        hidden_states: Tensor,
        position_embeddings: Rotary,
        *,
        encoder_hidden_states: Tensor,
        past_key_values: Any = None,
        text_rules: Mapping[str, Rule | None] | None = None,
        **_unused: Any,
    ) -> tuple[Tensor, None, None]:
        """Attention of this rank's text, ``[B, s, hidden]``; in generation of all, on every rank.

        Args:
            batch: the keyword.
            hidden_states: of the text.
            position_embeddings: of the text.
            encoder_hidden_states: what the encoder made of this rank's part of its rows,
                ``[B, n_r, hidden]``.
            past_key_values, text_rules: in generation, of the text.
        """
        q = self._queries(hidden_states, position_embeddings)
        text = self._keys(hidden_states, position_embeddings)
        rows = attend_part(self.plan, batch, q, **self._keys(encoder_hidden_states, None))
        if text_rules is None:
            layout: Layout = decoder_layout(batch, self.module.layer_type)
            own = attend_part(self.text_plan, replace(batch, text=layout), q, **text)
        else:
            cache, number = past_key_values.self_attention_cache, self.module.layer_idx
            cached = Cached(cache, number, text_rules[self.module.layer_type])
            keys = text["project_kv"](hidden_states)
            kernel = batch.text.kernel(self.plan.kernel, q)
            own = cached.attend(q, keys, scale=text["scale"], kernel=kernel)
        out, _ = merged([rows, own])
        return self.module.o_proj(out.flatten(2)), None, None


def _rotated(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding of ``[B, s, H, D]``."""
    turned: Tensor = apply_rotary_pos_emb(x, x[:, :, :0], *rotary, unsqueeze_dim=2)[0]
    # Under autocast it widens; SDPA would have narrowed it again.
    return turned.to(x.dtype)
