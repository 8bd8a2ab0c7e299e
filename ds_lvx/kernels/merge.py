"""Merging attention over disjoint keys, in fp32 (facts of softmax, no approximation).

    lse = logsumexp_j lse_j          out = sum_j exp(lse_j - lse) out_j

A part that saw no key is ``(0, -inf)``; merging two of them gives ``(0, -inf)``, not NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_part(q: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(0, -inf)`` for queries ``[batch, seqlen_q, num_heads, head_dim]``: attention to no key."""
    batch, seqlen, heads, _ = q.shape
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.full((batch, heads, seqlen), -torch.inf, dtype=dtype, device=q.device)
    return out, lse


def merge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge a part into ``out`` and ``lse``, in place.

    Args:
        out: fp32 (or fp64) ``[batch, seqlen_q, num_heads, head_dim]``.
        lse: the same dtype, ``[batch, num_heads, seqlen_q]``.
        part_out: any dtype, out's shape.
        part_lse: lse's shape.
    """
    total = torch.logaddexp(lse, part_lse)
    out.lerp_(part_out.to(out.dtype), per_row(weight_of(part_lse, total)).to(out.dtype))
    lse.copy_(total)


def merge(parts: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Merge ``(out, lse)`` parts over disjoint keys in order; the result is ``dtype`` (fp32)."""
    (first_out, first_lse), *others = parts
    out = first_out.to(dtype, copy=True)
    lse = first_lse.to(dtype, copy=True)
    for part_out, part_lse in others:
        merge_(out, lse, part_out, part_lse)
    return out, lse


def merge_stacked(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge ``n`` parts over disjoint keys at once.

    Args:
        out: fp32 (or fp64) ``[n, batch, seqlen_q, num_heads, head_dim]``; is written over.
        lse: the same dtype, ``[n, batch, num_heads, seqlen_q]``.
    """
    total = lse.logsumexp(dim=0)
    out *= per_row(weight_of(lse, total))
    return out.sum(dim=0), total


def weight_of(part_lse: Tensor, lse: Tensor) -> Tensor:
    """What a part weighs in the whole, ``exp(part_lse - lse)``; 0 where nothing is seen.

    There exp(-inf - finite) = 0 is what we want, and exp(-inf + inf) is NaN.
    """
    return torch.exp(part_lse - lse.clamp_min(torch.finfo(lse.dtype).min))


def per_row(weight: Tensor) -> Tensor:
    """A number a row, ``[..., num_heads, seqlen_q]``, in the layout of out, to multiply it with."""
    return weight.transpose(-1, -2).unsqueeze(-1)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which parts are merged and gradients added up: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
