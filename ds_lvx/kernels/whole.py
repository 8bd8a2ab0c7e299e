"""Calls in which all queries see all keys, arranged so that the field's kernels fill a GPU.

Attention of few queries over very many keys is not what these kernels are made for. Two things help
them, and both are exact:

- *Grouped heads*: the G query heads that share a key/value head become G queries of one head. K and
  V are then read, and dk and dv made, once a key/value head. Left to themselves the backward
  kernels make dk and dv of every query head, and add them up: 2.1 GB for 128K keys of 32 heads of
  128, where K and V have 0.5 GB.
- *Parts*: the keys cut in n, which stand as n samples with the same queries and merge by lse. 192
  queries are fewer tiles than a GPU has multiprocessors.

Legend: B batch, S queries, T keys, H query heads, K key/value heads, G = H / K, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ds_lvx.kernels.device import processors
from ds_lvx.kernels.late_triton import launches_triton, triton_parts
from ds_lvx.kernels.merge import accumulation_dtype, merge_, merge_stacked

Attend: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
Gradients: TypeAlias = Callable[..., tuple[Tensor, Tensor, Tensor]]

_TILE = 128  # queries of one head that a program of these kernels takes
_FEWER_TILES = 0.9  # to be worth two copies of the queries
_BUSY = 0.85  # share of the multiprocessors' time, to be worth no merge
_MOST_PARTS, _LEAST_KEYS = 32, 2048  # a part with fewer keys is over when it has begun


def forward(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over all keys, or causal, by some kernel's calls.

    Args:
        attend: such as `ds_lvx.kernels.flash.forward`.
        q, k, v, causal, softmax_scale: as there. What is causal is one call as it is.

    Returns:
        ``out [B, S, H, D]`` in q's dtype, or in fp32 where parts merged, and ``lse [B, H, S]``.
    """
    if causal:
        return attend(q, k, v, causal=True, softmax_scale=softmax_scale)
    batch, seqlen, heads, _ = q.shape
    kv_heads = k.shape[2]
    alone, together = heads * _tiles(seqlen), kv_heads * _tiles(seqlen * heads // kv_heads)
    groups = seqlen > 1 and together <= _FEWER_TILES * alone
    rows = grouped(q, kv_heads) if groups else q
    parts = 1
    # Parts of several samples cannot stand as samples; one query has kernels of its own.
    if batch == 1 and seqlen > 1:
        parts = parts_of(together if groups else alone, processors(q), k.shape[1])
    if parts == 1:
        out, lse = attend(rows, k, v, causal=False, softmax_scale=softmax_scale)
    else:
        out, lse = _in_parts(attend, (rows, k, v), parts, softmax_scale)
    return (_apart(out, seqlen), _apart_lse(lse, seqlen)) if groups else (out, lse)


def backward(
    gradients: Gradients,
    operands: tuple[Tensor, Tensor, Tensor],
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`, given the softmax over all keys of all ranks.

    Args:
        gradients: such as `ds_lvx.kernels.flash.backward`.
        operands: q, k and v.
        dout, out, lse, causal, softmax_scale: as there; lse need not be contiguous.

    Returns:
        dq, dk, dv like q, k, v.
    """
    how = {"causal": causal, "softmax_scale": softmax_scale}
    q, k, v = operands
    (_, seqlen, heads, _), (seqlen_kv, kv_heads) = q.shape, k.shape[1:3]
    if causal or heads == kv_heads or seqlen_kv < seqlen:
        return gradients(q, k, v, dout, out, lse.contiguous(), **how)
    q, dout, out = (grouped(t, kv_heads) for t in (q, dout, out))
    dq, dk, dv = gradients(q, k, v, dout, out, _grouped_lse(lse, kv_heads), **how)
    return _apart(dq, seqlen), dk, dv


def parts_of(tiles: int, processors: int, keys: int) -> int:
    """Into how many parts to cut the keys: as few as keep the multiprocessors busy.

    Args:
        tiles: programs of an uncut call.
        processors: that take one each at a time.
        keys: how many there are.
    """
    most = max(min(_MOST_PARTS, keys // _LEAST_KEYS), 1)
    numbers = [1 << n for n in range(most.bit_length())]

    def busy(parts: int) -> float:
        turns = -(-tiles * parts // processors)
        return tiles * parts / (turns * processors)

    return next((n for n in numbers if busy(n) >= _BUSY), max(numbers, key=busy))


def grouped(tensor: Tensor, kv_heads: int) -> Tensor:
    """``[B, S, H, D]`` -> ``[B, S * G, K, D]``."""
    apart = tensor.unflatten(2, (kv_heads, -1)).transpose(2, 3)
    return apart.reshape(len(tensor), -1, kv_heads, tensor.shape[3])


def _apart(tensor: Tensor, seqlen: int) -> Tensor:
    """`grouped` undone."""
    by_head = tensor.unflatten(1, (seqlen, -1)).transpose(2, 3)
    return by_head.reshape(len(tensor), seqlen, -1, tensor.shape[3])


def _grouped_lse(lse: Tensor, kv_heads: int) -> Tensor:
    """``[B, H, S]`` -> ``[B, K, S * G]``, dense."""
    return lse.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(2).contiguous()


def _apart_lse(lse: Tensor, seqlen: int) -> Tensor:
    """`_grouped_lse` undone."""
    return lse.unflatten(2, (seqlen, -1)).transpose(2, 3).flatten(1, 2)


def _tiles(rows: int) -> int:
    return -(-rows // _TILE)


def _in_parts(
    attend: Attend, tensors: tuple[Tensor, Tensor, Tensor], parts: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """`forward` of one sample in one call over keys cut in parts, and one for what is left."""
    q, *keys = tensors
    how = {"causal": False, "softmax_scale": softmax_scale}
    length = keys[0].shape[1] // parts
    cut = parts * length
    k, v = (t[0, :cut].unflatten(0, (parts, length)) for t in keys)
    out, lse = _merged(*attend(q.expand(parts, -1, -1, -1), k, v, **how))
    if cut < keys[0].shape[1]:
        k, v = (t[:, cut:] for t in keys)
        merge_(out, lse, *attend(q, k, v, **how))
    return out, lse


def _merged(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """``[n, S, H, D]`` and ``[n, H, S]`` of one sample to ``[1, S, H, D]`` and ``[1, H, S]``."""
    outs, lses = outs.unsqueeze(1), lses.unsqueeze(1)
    dtype = accumulation_dtype(outs.dtype)
    if launches_triton(outs) and dtype == torch.float32:
        merged: tuple[Tensor, Tensor] = triton_parts().join(
            outs.contiguous(), None, lses, outs[0], 0
        )
        return merged
    return merge_stacked(outs.to(dtype, copy=True), lses.to(dtype))
