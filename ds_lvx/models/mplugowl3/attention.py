"""mPLUG-Owl3's attention on this rank's shards: text, or one softmax over images and text.

The layers hand no keyword on to their attention but the mask, so what attention must know of a
sharded batch travels with that, of which nothing else is needed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ds_lvx.attention.merge import merged
from ds_lvx.attention.projection import Placed
from ds_lvx.models.attend import attend, attend_part
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.cached import attend_cached
from ds_lvx.models.layers import Layer, LayerPlan
from ds_lvx.models.mplugowl3.cached import Cached
from ds_lvx.models.patch import KEYWORD, ShardedForward, fill, heads, refuse_dropout, trains
from ds_lvx.models.rotary import rotated

Rotary = tuple[Tensor, Tensor]


def mask_of(
    batch: ShardedBatch,
    x: Tensor,
    *,
    text: Rotary,
    images: Rotary | None,
    cached: Cached | None = None,
) -> Tensor:
    """The mask that carries a sharded batch, and the rotary embeddings of its text and images; in
    generation it is one layer's, with its text so far."""
    mask: Any = x.new_zeros(1, 1, 1, 1)
    mask.ds_lvx, mask.text, mask.images, mask.cached = batch, text, images, cached
    return cast(Tensor, mask)


class Attention(ShardedForward):
    """Attention of the text to itself, and in hyper layers to the images: in the same softmax, or
    in one of their own, mixed by a gate.

    Args:
        layer: an attention module of Qwen2's, with ``v_kv_proj`` in a hyper layer.
        plan: how it runs. In a hyper layer it is for the images; the text's keys, few and with few
            heads, go by ring attention.
    """

    def __init__(self, layer: Layer, plan: LayerPlan) -> None:
        super().__init__(layer.module, plan)
        self.kv_heads, self.head_dim = layer.num_kv_heads, layer.head_dim
        self.text_plan = plan
        if plan.kind == "cross":
            method = "none" if plan.method == "none" else "ring"
            self.text_plan = LayerPlan(plan.name, "self", method, "auto", plan.kernel, False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = getattr(kwargs.get("attention_mask"), KEYWORD, None)
        if batch is not None:  # in generation, too: the text's keys are cached here
            return self.sharded(batch, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    def sharded(
        self,
        batch: ShardedBatch,
        hidden_states: Tensor,
        *,
        attention_mask: Any,
        image_embeds: Tensor | None = None,
        **_unused: Any,
    ) -> tuple[Tensor, None, None]:
        """Attention of this rank's text.

        Args:
            batch: from the mask.
            hidden_states: ``[B, s, hidden]``, normed.
            attention_mask: of `mask_of`.
            image_embeds: the features of this rank's images ``[B, s_kv, hidden]``, normed by the
                layer. They are not normed again with K and V: the norm is the text's as well, and
                its weight would get two gradients, which ZeRO's hooks do not stand.
        """
        module = self.module
        refuse_dropout(module.attention_dropout if module.training else 0.0)
        q = rotated(heads(module.q_proj(hidden_states), self.head_dim), *attention_mask.text)
        if image_embeds is None:
            out, _ = self._to_text(batch, q, hidden_states, attention_mask, returns_lse=False)
        else:
            # What the layers share are the features before their norms.
            own = replace(batch, features_gradient=None)
            images = self._images(image_embeds, attention_mask)
            if is_gated(module):
                visual = attend(self.plan, own, q, **images)
                text, _ = self._to_text(batch, q, hidden_states, attention_mask, returns_lse=False)
                return self._mixed(batch, text, visual)
            visual_part = attend_part(self.plan, own, q, **images)
            text_part = self._to_text(batch, q, hidden_states, attention_mask, returns_lse=True)
            out, _ = merged([visual_part, text_part])
        return module.o_proj(out.flatten(2)), None, None

    def _mixed(
        self, batch: ShardedBatch, text: Tensor, visual: Tensor
    ) -> tuple[Tensor, None, None]:
        """Text and images ``[B, s, H, D]`` by the gate; where no image is seen, text."""
        share = self.module.gate.sigmoid().to(text.dtype)
        if batch.row_mask is not None:
            share = share * batch.row_mask[:, 0]
        mixed = text.flatten(2) * (1 - share) + visual.flatten(2) * share
        return self.module.o_proj(mixed), None, None

    def _to_text(
        self, batch: ShardedBatch, q: Tensor, x: Tensor, carried: Any, *, returns_lse: bool
    ) -> tuple[Tensor, Tensor]:
        """Attention to the text, of which every rank has a part, or in generation all."""
        text, cached = self._text(batch, x, carried), carried.cached
        if batch.shards("self"):
            return attend_part(self.text_plan, batch, q, **text, returns_lse=returns_lse)
        keys, kernel = text["project_kv"](x), batch.text.kernel(self.plan.kernel, q)
        return attend_cached(q, keys, cached.rule, scale=text["scale"], kernel=kernel)

    def _text(self, batch: ShardedBatch, x: Tensor, carried: Any) -> dict[str, Any]:
        module, cached = self.module, carried.cached

        def project(features: Tensor) -> tuple[Tensor, Tensor]:
            k = rotated(heads(module.k_proj(features), self.head_dim), *carried.text)
            keys = k, heads(module.v_proj(features), self.head_dim)
            return keys if cached is None else fill(batch, cached.cache, keys, layer=cached.number)

        return self._arguments(x, project, trains(module.k_proj, module.v_proj))

    def _images(self, features: Tensor, carried: Any) -> dict[str, Any]:
        module = self.module

        def project(features: Tensor, tokens: slice) -> tuple[Tensor, Tensor]:
            # Looked up at every call: LoRA and ZeRO-3 act on the modules' own calls.
            if carried.cached is not None:  # kept as they were before the first layer's norm
                features = carried.cached.norm(features)
            both = module.v_kv_proj(features).unflatten(2, (-1, 2, self.head_dim))
            k, v = both.unbind(dim=3)
            return rotated(k, *(part[:, tokens] for part in carried.images)), v

        return self._arguments(features, Placed(project), trains(module.v_kv_proj))

    def _arguments(self, features: Tensor, project: Any, training: bool) -> dict[str, Any]:
        return {
            "features": features,
            "project_kv": project,
            "trains": training,
            "kv_heads": self.kv_heads,
            "scale": self.head_dim**-0.5,
        }


def is_gated(module: Any) -> bool:
    """Whether a hyper layer's attention is that of release 240728."""
    return hasattr(module, "gate")


def rotary(positions: Tensor, *, head_dim: int, theta: float) -> Rotary:
    """Cosines and sines in fp32, ``[B or 1, s, D]``, of positions ``[B or 1, s]``."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions.float()[..., None] / theta**exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()
