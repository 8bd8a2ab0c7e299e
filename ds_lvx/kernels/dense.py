"""Attention of one block by plain matrix products: slower than a fused kernel, and never at a loss.

It serves where PyTorch's fused kernels cannot: a mask on CUDA, fp32 on CUDA, a gradient of lse.
In float64 over the whole of a rank's keys it is the ``reference`` kernel.

Legend: B batch, S queries, T keys, H query heads, K key/value heads, G = H / K, D head_dim.
Query head ``h`` attends with key/value head ``h // G``; K and V are not repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def _as_written(function: Callable[P, R]) -> Callable[P, R]:
    """Keep autocast from computing in another dtype than asked for."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


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
    scores = _scores(q, k, mask, softmax_scale=softmax_scale, dtype=dtype)
    lse = scores.logsumexp(dim=-1)
    weights = _weights(scores, lse)
    out = torch.einsum("bkgst,btkd->bskgd", weights, v.to(dtype)).flatten(2, 3)
    return out, lse.flatten(1, 2)


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
    heads = k.shape[2]
    scores = _scores(q, k, mask, softmax_scale=softmax_scale, dtype=dtype)
    weights = _weights(scores, lse.to(dtype).unflatten(1, (heads, -1)))
    dout = dout.to(dtype).unflatten(2, (heads, -1))
    dv = torch.einsum("bkgst,bskgd->btkd", weights, dout)
    dweights = torch.einsum("bskgd,btkd->bkgst", dout, v.to(dtype))
    delta = delta.to(dtype).unflatten(1, (heads, -1)).unsqueeze(-1)
    dscores = weights * (dweights - delta) * softmax_scale
    dq = torch.einsum("bkgst,btkd->bskgd", dscores, k.to(dtype)).flatten(2, 3)
    dk = torch.einsum("bkgst,bskgd->btkd", dscores, q.to(dtype).unflatten(2, (heads, -1)))
    return dq, dk, dv


def _scores(
    q: Tensor, k: Tensor, mask: Tensor | None, *, softmax_scale: float, dtype: torch.dtype
) -> Tensor:
    q = q.to(dtype).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bskgd,btkd->bkgst", q, k.to(dtype)) * softmax_scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return scores


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    # A row that sees nothing has lse = -inf and scores of -inf: exp(-inf - 0) = 0, no NaN.
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
