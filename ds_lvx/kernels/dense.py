"""Attention of one block by plain matrix products, which are never at a loss.

They serve where PyTorch's fused kernels cannot: a mask on CUDA, fp32 on CUDA, a gradient of lse;
and on a CPU where they are faster (`ds_lvx.kernels.onednn`). In float64 over the whole of a rank's
keys they are the ``reference`` kernel.

Legend: B batch, S queries, T keys, H query heads, K key/value heads, G = H / K, D head_dim.
Query head ``h`` attends with key/value head ``h // G``; K and V are not repeated. Scores carry a
factor log2(e), since ``exp2`` is several times as fast as ``exp`` on a CPU.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_LN_2 = math.log(2.0)
_KEPT_BYTES = 2**23  # of each of `_Kept`'s: as large as a block's scores become on a CPU

P = ParamSpec("P")
R = TypeVar("R")


def _as_written(function: Callable[P, R]) -> Callable[P, R]:
    """Keep autocast from computing in another dtype than asked for, and autograd from looking."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


class _Kept(threading.local):
    """What a block needs for itself, kept for the next block; each thread has its own.

    malloc gives freed memory at the end of the heap back to the system, and the next block faults
    it in again page by page: on some ranks, for which the others then wait. CUDA's memory is
    PyTorch's to keep.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def empty(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor; the one that had this name before is lost."""
        numbers = math.prod(shape)
        if like.device.type != "cpu" or numbers * like.element_size() > _KEPT_BYTES:
            return like.new_empty(shape)
        kept = self._buffers.get(name)
        if kept is None or kept.dtype != like.dtype or len(kept) < numbers:
            with torch.inference_mode(False):  # or nothing outside of one could write to it
                kept = self._buffers[name] = torch.empty(numbers, dtype=like.dtype, device="cpu")
        return kept[:numbers].view(shape)


_kept = _Kept()


@_as_written
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    softmax_scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Attention over one block of keys.

    Args:
        q: ``[B, S, H, D]``.
        k, v: ``[B, T, K, D]``.
        mask: bool ``[B, S, T]``, True where a query sees a key; None is everywhere.
        softmax_scale: factor on the scores.
        dtype: in which everything is computed and returned.

    Returns:
        ``out [B, S, H, D]`` and ``lse [B, H, S]``; ``(0, -inf)`` for a row that sees nothing.
    """
    batch, seqlen, heads, _ = q.shape
    kv_heads = k.shape[2]
    queries, keys = _rows(q, kv_heads, dtype), _rows(k, kv_heads, dtype, "keys")
    scores = _scores(queries, keys, mask, heads=heads, softmax_scale=softmax_scale)
    largest = _finite(scores.amax(dim=-1, keepdim=True))
    weights = scores.sub_(largest).exp2_()
    total = weights.sum(dim=-1, keepdim=True)
    values = _rows(v, kv_heads, dtype, "values")
    out = torch.bmm(weights, values).div_(total.masked_fill(total == 0, 1.0))
    lse = largest.add_(total.log2_()).mul_(_LN_2).view(batch, heads, seqlen)
    return _unpacked(out, q), lse


@_as_written
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    *,
    mask: Tensor | None,
    softmax_scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block, given the global softmax.

    Args:
        q, k, v, mask, softmax_scale, dtype: as in `forward`.
        dout: ``[B, S, H, D]``.
        lse: global log-sum-exp ``[B, H, S]``.
        delta: ``rowsum(dout * out) - dlse``, ``[B, H, S]``.

    Returns:
        This block's part of dq ``[B, S, H, D]``, and its exact dk and dv ``[B, T, K, D]``.
    """
    batch, seqlen, kv_heads, head_dim = k.shape
    row = (batch * kv_heads, -1, 1)
    queries, dout = _rows(q, kv_heads, dtype), _rows(dout, kv_heads, dtype)
    keys, values = _rows(k, kv_heads, dtype, "keys"), _rows(v, kv_heads, dtype, "values")
    weights = _scores(queries, keys, mask, heads=q.shape[2], softmax_scale=softmax_scale)
    weights.sub_(_finite(lse.to(dtype)).reshape(row) / _LN_2).exp2_()
    dv = torch.bmm(weights.transpose(1, 2), dout)
    dscores = _product(dout, values.transpose(1, 2), "dscores")
    dscores.sub_(delta.to(dtype).reshape(row)).mul_(weights)
    dq = torch.bmm(dscores, keys).mul_(softmax_scale)
    dk = torch.bmm(dscores.transpose(1, 2), queries * softmax_scale)
    shape = (batch, kv_heads, seqlen, head_dim)
    return _unpacked(dq, q), dk.view(shape).transpose(1, 2), dv.view(shape).transpose(1, 2)


def _scores(
    queries: Tensor, keys: Tensor, mask: Tensor | None, *, heads: int, softmax_scale: float
) -> Tensor:
    """``log2(e) softmax_scale q k^T``, ``[B K, G S, T]``, of `_rows`."""
    scores = _product(queries * (softmax_scale / _LN_2), keys.transpose(1, 2), "scores")
    if mask is not None:
        by_query = scores.view(len(mask), heads, *mask.shape[1:])
        by_query.masked_fill_(~mask[:, None], -torch.inf)
    return scores


def _product(one: Tensor, other: Tensor, name: str) -> Tensor:
    shape = (len(one), one.shape[1], other.shape[2])
    return torch.bmm(one, other, out=_kept.empty(name, shape, one))


def _rows(tensor: Tensor, kv_heads: int, dtype: torch.dtype, name: str | None = None) -> Tensor:
    """``[B, S, H, D]`` as ``[B K, G S, D]``: a matrix for each head of K and V.

    Rows that lie apart would make a product take far longer, hence a copy; a kept one by ``name``.
    """
    batch, _, _, head_dim = tensor.shape
    by_head = tensor.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    if name is None:
        dense = by_head.to(dtype, memory_format=torch.contiguous_format).contiguous()
    else:
        dense = _kept.empty(name, by_head.shape, tensor.new_empty(0, dtype=dtype)).copy_(by_head)
    return dense.view(batch * kv_heads, -1, head_dim)


def _unpacked(rows: Tensor, q: Tensor) -> Tensor:
    """`_rows` undone: q's shape."""
    batch, seqlen, heads, head_dim = q.shape
    return rows.view(batch, heads, seqlen, head_dim).transpose(1, 2)


def _finite(rows: Tensor) -> Tensor:
    """-inf, of a row that sees nothing, as 0: ``exp(-inf - 0)`` is 0, ``exp(-inf + inf)`` NaN."""
    return rows.masked_fill(rows == -torch.inf, 0.0)
