"""Self-attention of transformers' MPT on this rank's shards, its bias by distance included.

MPT has no position embedding. To the score of query i and key j it adds ``slope * j``, with a slope
for each head (ALiBi); what depends on i alone would not change a softmax. A bias of this form is a
product: further dimensions of q hold the slopes, those of k the places, and every method and kernel
computes it like the rest of the score. In 16 bits both are sums of numbers that the dtype has, as
exact together as in fp32, in which a kernel adds up their products.

Legend: B samples, s text tokens of this rank, H heads, D size of a head, n further dimensions.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_lvx.kernels.transfer import to_device
from ds_lvx.models.attend import attend_to
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.patch import KEYWORD, FusedForward, fill, heads, refuse_dropout

BIAS = "position_bias"
CLASS = "MptAttention"
_MULTIPLE = 8  # of the size of a head that fused kernels want


def carrying(bias: Tensor, batch: ShardedBatch) -> Tensor:
    """The bias that the model hands to its layers, and with it a sharded batch.

    The layers hand no keyword of ours on to their attention.
    """
    carrier: Any = bias.view_as(bias)
    carrier.ds_lvx = batch
    return cast(Tensor, carrier)


class SelfAttention(FusedForward):
    """`MptAttention`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = getattr(kwargs.get(BIAS), KEYWORD, None)
        return super().__call__(*args, ds_lvx=batch, **kwargs)

    def sharded(
        self,
        batch: ShardedBatch,
        x: Tensor,
        position_bias: Tensor,
        past_key_values: Any = None,
        **_unused: Any,
    ) -> tuple[Tensor, None]:
        """Attention of this rank's text ``[B, s, H * D]``.

        Args:
            batch: the keyword.
            x: the text.
            position_bias: ``[H, 1, longest]``, of which the last two keys tell the slopes.
            past_key_values: the cache, in generation.
        """
        module = self.module
        refuse_dropout(module.attn_dropout_p if module.training else 0.0)
        mixed = module.Wqkv(x)
        if module.clip_qkv:
            mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        q, k, v = (heads(part, module.head_dim) for part in mixed.chunk(3, dim=2))
        cache, number, past = past_key_values, module.layer_idx, 0
        if batch.behind:
            past = cache.get_seq_length(number)
        else:  # plain, as the module's own forward takes them from there; with those before
            k, v = fill(batch, cache, (k, v), layer=number)
        scale = float(module.softmax_scale)

        def settle() -> tuple[Tensor, Tensor]:
            slopes = (position_bias[:, 0, -1] - position_bias[:, 0, -2]) / scale
            longest = position_bias.shape[-1]
            places, length = _places(batch, past, tokens=q.shape[1], longest=longest)
            return columns(slopes, places, length, dtype=q.dtype, head_dim=module.head_dim)

        of_queries, of_keys = batch.text.settled((BIAS, q.dtype, scale, past), settle)
        k = torch.cat((k, of_keys[:, None].expand(*k.shape[:3], -1)), dim=-1)
        v = F.pad(v, (0, of_keys.shape[-1]))
        if batch.behind:
            k, v = fill(batch, cache, (k, v), layer=number)
        q = torch.cat((q, of_queries.expand(*q.shape[:3], -1)), dim=-1)
        out = attend_to(self.plan, batch, q, (k, v), scale=scale)
        return module.out_proj(out[..., : module.head_dim].flatten(2)), None


def _places(batch: ShardedBatch, past: int, *, tokens: int, longest: int) -> tuple[Tensor, int]:
    """Places of the keys that are to get a bias, and the length of a text with all that they ever
    meet.

    Args:
        batch: the keyword.
        past: tokens before those of a forward behind a sharded prompt.
        tokens: of this forward, s.
        longest: of the model's texts.
    """
    length = batch.past + sum(batch.text_lengths)
    if batch.decoding is None:
        return batch.places, length
    places = batch.places if batch.split else torch.arange(past, past + tokens, device="cpu")
    if batch.split and not batch.behind:  # those in the cache have none yet
        places = torch.cat((torch.arange(batch.past, device="cpu"), places))
    end = length if batch.split else past + tokens
    if end > longest:
        raise ValueError(
            f"got {end} text tokens for an MPT with max_seq_len {longest}, which has no bias for "
            "more; expected a shorter text, or fewer new tokens"
        )
    return places, longest


def columns(
    slopes: Tensor, places: Tensor, length: int, *, dtype: torch.dtype, head_dim: int
) -> tuple[Tensor, Tensor]:
    """The further dimensions of q ``[H, n]`` and of some tokens' k ``[s, n]``.

    Args:
        slopes: ``[H]``, of the scores before they are scaled.
        places: int64 ``[s]``, of these tokens.
        length: of the whole text.
        dtype: of q and k.
        head_dim: D; with n it becomes a multiple of 8.
    """
    # From the middle: the smaller the numbers are, the finer is what fp32 keeps of their sums.
    every = torch.arange(length, dtype=torch.float64, device="cpu") - length // 2
    of_keys = exact_parts(every, dtype, parts=_parts_of(every, dtype))[places]
    of_keys = to_device(of_keys.contiguous(), slopes.device)
    # What fp32 keeps of a slope, in as many parts as that takes.
    of_queries = exact_parts(slopes.double(), dtype, parts=1 if dtype.itemsize > 2 else 3)
    pairs = of_queries.shape[1], of_keys.shape[1]
    of_queries, of_keys = of_queries.repeat_interleave(pairs[1], 1), of_keys.repeat(1, pairs[0])
    padding = 0, -(head_dim + pairs[0] * pairs[1]) % _MULTIPLE
    return F.pad(of_queries, padding), F.pad(of_keys, padding)


def exact_parts(x: Tensor, dtype: torch.dtype, *, parts: int) -> Tensor:
    """``[n]`` in fp64 as ``[n, parts]`` in ``dtype``, whose sums are as near as they can be."""
    found = []
    for _ in range(parts):
        found.append(x.to(dtype))
        x = x - found[-1].to(x.dtype)
    return torch.stack(found, dim=-1)


def _parts_of(places: Tensor, dtype: torch.dtype) -> int:
    """How many parts of a dtype make integers exact."""
    parts = 1
    while (exact_parts(places, dtype, parts=parts).double().sum(-1) != places).any():
        parts += 1
    return parts
