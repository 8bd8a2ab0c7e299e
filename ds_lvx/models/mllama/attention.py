"""mllama's attention on this rank's shards, for what transformers' interface cannot serve."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.mllama.modeling_mllama import apply_rotary_pos_emb

from ds_lvx.models.attend import attend
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.patch import ShardedForward, fill, heads, refuse_dropout, trains


class CrossAttention(ShardedForward):
    """`MllamaTextCrossAttention` with this rank's text and this rank's images."""

    def sharded(
        self,
        batch: ShardedBatch,
        hidden_states: Tensor,
        *,
        cross_attention_states: Tensor,
        **_unused: Any,
    ) -> tuple[Tensor, None]:
        module = self.module
        refuse_dropout(module.dropout if module.training else 0.0)
        projected = heads(module.q_proj(hidden_states), module.head_dim)
        # Under autocast the norm's fp32 weight widens q; SDPA would have narrowed it again.
        q = module.q_norm(projected).to(projected.dtype)

        def project_kv(features: Tensor) -> tuple[Tensor, Tensor]:
            # Looked up at every call: LoRA and ZeRO-3 act on the modules' own calls.
            k = heads(module.k_proj(features), module.head_dim)
            return module.k_norm(k).to(k.dtype), heads(module.v_proj(features), module.head_dim)

        out = attend(
            self.plan,
            batch,
            q,
            features=cross_attention_states,
            project_kv=project_kv,
            trains=trains(module.k_proj, module.v_proj, module.k_norm),
            kv_heads=module.num_key_value_heads,
            scale=module.scaling,
        )
        return module.o_proj(out.flatten(2)), None


class RecomputedSelfAttention(ShardedForward):
    """`MllamaTextSelfAttention` whose K and V are projected again in backward."""

    def sharded(
        self,
        batch: ShardedBatch,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        **_unused: Any,
    ) -> tuple[Tensor, None]:
        module = self.module
        refuse_dropout(module.dropout if module.training else 0.0)
        cos, sin = position_embeddings
        q = _rotate(heads(module.q_proj(hidden_states), module.head_dim), cos, sin)

        def project_kv(features: Tensor) -> tuple[Tensor, Tensor]:
            k = _rotate(heads(module.k_proj(features), module.head_dim), cos, sin)
            keys = k, heads(module.v_proj(features), module.head_dim)
            return fill(batch, past_key_values, keys, layer=module.layer_idx)

        out = attend(
            self.plan,
            batch,
            q,
            features=hidden_states,
            project_kv=project_kv,
            trains=trains(module.k_proj, module.v_proj),
            kv_heads=module.num_key_value_heads,
            scale=module.scaling,
        )
        return module.o_proj(out.flatten(2)), None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``[B, s, H, D]``, in x's dtype."""
    rotated, _ = apply_rotary_pos_emb(x, x[:, :, :0], cos, sin, unsqueeze_dim=2)
    return rotated.to(x.dtype)
