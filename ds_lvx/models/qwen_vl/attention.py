"""Qwen-VL's attention of the text on this rank's shard.

A layer hands its attention the rotary embedding as it got it. What attention must know of a sharded
batch travels in its place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ds_lvx.kernels.transfer import to_device
from ds_lvx.models.attend import attend_to
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.cached import Cached
from ds_lvx.models.patch import FusedForward, heads, refuse_dropout
from ds_lvx.models.rotary import rotated

ROTARY = "rotary_pos_emb"


@dataclass(frozen=True, eq=False)
class Carried:
    """What the layers hand on to their attention.

    Attributes:
        batch: the sharded batch.
        cos, sin: of this rank's tokens, fp32 ``[1, s, n]``; a head's first n dimensions turn.
        log_n: fp32 ``[1, s, 1, 1]``, factor of the queries at their places in evaluation.
        cached: in generation the text so far, which every rank has.
    """

    batch: ShardedBatch
    cos: Tensor
    sin: Tensor
    log_n: Tensor
    cached: Cached | None = None

    @classmethod
    def of(
        cls, batch: ShardedBatch, text: Any, x: Tensor, *, cached: Cached | None = None
    ) -> Carried:
        """That of a batch, by the places of tokens in the whole text.

        Args:
            batch: the keyword.
            text: the text model, with ``rotary_emb``.
            x: its tokens here, ``[B, s, hidden]``.
            cached: see the class. The base of the rotary embedding is that of the prompt then, as
                in the model's own code: its keys stay as they are.
        """
        device = x.device
        if cached is None or batch.decoding is None:
            length, places = sum(batch.text_lengths), to_device(batch.places, device).float()
        else:
            length, past = batch.decoding.first_tokens, cached.cache.get_seq_length()
            places = torch.arange(past, past + x.shape[1], device=device).float()
        size, base = int(text.rotary_emb.dim), float(text.rotary_emb.base)
        if text.use_dynamic_ntk and not text.training:
            base *= _ntk_alpha(length, text.seq_length) ** (size / (size - 2))
        exponents = torch.arange(0, size, 2, device=device).float() / size
        angles = torch.outer(places, 1.0 / base**exponents)[None]
        angles = torch.cat((angles, angles), dim=-1)
        log_n = ((places + 1).log() / math.log(text.seq_length)).clamp(min=1)
        return cls(batch, angles.cos(), angles.sin(), log_n[None, :, None, None], cached)

    def layer(self, number: int) -> Carried:
        """The same for one of the layers."""
        if self.cached is None:
            return self
        return replace(self, cached=replace(self.cached, number=number))


class Attention(FusedForward):
    """``QWenAttention``: one projection to q, k and v, rotary embedding of q and k."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = (*args, kwargs.get(ROTARY))
        batch = next((each.batch for each in given if isinstance(each, Carried)), None)
        if batch is not None:  # in generation, too: the text's keys are cached here
            return self.sharded(batch, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    def sharded(
        self, batch: ShardedBatch, hidden_states: Tensor, rotary_pos_emb: Carried, **_unused: Any
    ) -> tuple[Tensor, None]:
        """Attention of this rank's text ``[B, s, H * D]``.

        Args:
            batch: the keyword.
            hidden_states: the text.
            rotary_pos_emb: what the layer was handed.
        """
        module = self.module
        refuse_dropout(module.attn_dropout.p if module.training else 0.0)
        mixed = module.c_attn(hidden_states).chunk(3, dim=2)
        q, k, v = (heads(part, module.head_dim) for part in mixed)
        q, k = (_turned(part, rotary_pos_emb) for part in (q, k))
        if module.use_logn_attn and not module.training:
            q = q * rotary_pos_emb.log_n.to(q.dtype)
        scale, cached = module.head_dim**-0.5, rotary_pos_emb.cached
        if cached is not None:
            kernel = batch.text.kernel(self.plan.kernel, q)
            found, _ = cached.attend(q, (k, v), scale=scale, kernel=kernel)
            return module.c_proj(found.flatten(2)), None
        out = attend_to(self.plan, batch, q, (k, v), scale=scale)
        return module.c_proj(out.flatten(2)), None


def _turned(x: Tensor, carried: Carried) -> Tensor:
    turns = carried.cos.shape[-1]
    turned = rotated(x[..., :turns], carried.cos, carried.sin)
    return torch.cat((turned, x[..., turns:]), dim=-1) if turns < x.shape[-1] else turned


def _ntk_alpha(length: int, trained: int) -> float:
    """Factor of the rotary base for a text that is longer than those of the training."""
    return float(max(2 ** math.ceil(math.log2(length / trained) + 1) - 1, 1))
