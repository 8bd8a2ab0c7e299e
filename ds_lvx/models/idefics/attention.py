"""idefics's attention on this rank's shards, where K and V are projected here."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.idefics.modeling_idefics import apply_rotary_pos_emb

from ds_lvx.models.attend import attend
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.patch import ShardedForward, fill, heads, refuse_dropout, trains


class Attention(ShardedForward):
    """`IdeficsAttention`: of text over the images, or over itself with K and V projected again.

    Rotary embedding (of text over itself), then the norms that the model may have.
    """

    def sharded(
        self,
        batch: ShardedBatch,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **_unused: Any,
    ) -> tuple[Tensor, None]:
        module = self.module
        refuse_dropout(module.dropout if module.training else 0.0)
        source = hidden_states if key_value_states is None else key_value_states
        rotary = None
        if not module.is_cross_attention:
            rotary = module.rotary_emb(hidden_states, position_ids)

        def projected(linear: nn.Module, norm: str, x: Tensor) -> Tensor:
            # Looked up at every call: LoRA and ZeRO-3 act on the modules' own calls.
            plain = heads(linear(x), module.head_dim)
            turned = plain if rotary is None else _rotate(plain, *rotary)
            if module.qk_layer_norms:
                turned = getattr(module, norm)(turned)
            # Under autocast rotary embedding and norm widen it; SDPA would have narrowed it again.
            return turned.to(plain.dtype)

        def project_kv(features: Tensor) -> tuple[Tensor, Tensor]:
            k = projected(module.k_proj, "k_layer_norm", features)
            keys = k, heads(module.v_proj(features), module.head_dim)
            if rotary is None:
                return keys
            return fill(batch, past_key_values, keys, layer=module.layer_idx)

        norms = (module.k_layer_norm,) if module.qk_layer_norms else ()
        out = attend(
            self.plan,
            batch,
            projected(module.q_proj, "q_layer_norm", hidden_states),
            features=source,
            project_kv=project_kv,
            trains=trains(module.k_proj, module.v_proj, *norms),
            kv_heads=module.num_heads,
            scale=module.scaling,
        )
        return module.o_proj(out.flatten(2)), None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``[B, s, H, D]``."""
    rotated: Tensor = apply_rotary_pos_emb(x, x[:, :, :0], cos, sin, unsqueeze_dim=2)[0]
    return rotated
