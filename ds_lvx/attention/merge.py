"""One softmax over keys that different attentions saw: their results merge by lse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_lvx.config.registry import FLOATS
from ds_lvx.kernels.merge import accumulation_dtype, merge, per_row, weight_of

_HOW = "pass [(out, lse), ...] as lv_xattn(..., return_lse=True) returns them"


def merge_attention(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The attention over all keys, from attentions of the same queries over disjoint keys.

    One softmax over sharded visual keys and the text's own, for instance::

        visual = ds_lvx.lv_xattn(q, k_visual, v_visual, visibility=..., return_lse=True)
        text = ds_lvx.ring_attention(q, k, v, visibility=..., return_lse=True)
        out, lse = ds_lvx.merge_attention([visual, text])

    Args:
        parts: one or more pairs, alike in shape, dtype and device; no key in two of them, and all
            with the same ``softmax_scale``.
            ``out [batch, seqlen_q, num_heads, head_dim]``: fp32, bf16, fp16 or fp64.
            ``lse [batch, num_heads, seqlen_q]``: natural log, fp32 (fp64 where out is). A row that
            saw nothing is ``(0, -inf)``.

    Returns:
        ``(out, lse)`` of the same shapes and dtypes, merged in lse's dtype. Both are
        differentiable, with gradients for every out and lse. A row that no part saw is
        ``(0, -inf)``, and its gradients are 0.

    Raises:
        ValueError: no part, or parts that are not as above; on the rank that passed them.

    Collectives: none. Backward needs the parts, which their own attentions keep anyway, and lse.

    Source: the paper's section 3.1, for parts of any origin.
    """
    _check(parts)
    return merged(parts)


def merged(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`merge_attention` of parts that our own layers have made."""
    if not torch.is_grad_enabled():  # a generation's token: no graph to make
        return _merged(parts)
    outs, lses = zip(*parts, strict=True)
    out, lse = _MergeAttention.apply(*outs, *lses)
    return out, lse


def _merged(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    (first, lse), *_ = parts
    out, lse = merge(parts, lse.dtype)
    return out.to(first.dtype), lse


class _MergeAttention(torch.autograd.Function):
    """The merge, whose backward is, with ``w_j = exp(lse_j - lse)``: ``dout_j = w_j dout`` and
    ``dlse_j = w_j (rowsum(dout * out_j) - sum_i w_i rowsum(dout * out_i) + dlse)``.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = _merged(list(zip(*_halves(tensors), strict=True)))
        ctx.save_for_backward(lse, *tensors)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        lse, *tensors = ctx.saved_tensors
        outs, lses = _halves(tensors)
        weights = [weight_of(part, lse) for part in lses]
        zero = torch.zeros_like(lse)
        douts: list[Tensor | None] = [None] * len(outs)
        rows = [zero] * len(outs)
        if dout is not None:
            wide = dout.to(lse.dtype)
            douts = [(wide * per_row(weight)).to(dout.dtype) for weight in weights]
            rows = [(wide * out).sum(dim=-1).transpose(1, 2) for out in outs]
        delta = zero if dlse is None else -dlse
        for weight, row in zip(weights, rows, strict=True):
            delta = delta + weight * row
        # Nothing flows back through a row that saw nothing, whatever arrives: 0 * inf is NaN.
        unseen = lse == -torch.inf
        pairs = zip(weights, rows, strict=True)
        return *douts, *((w * (row - delta)).masked_fill(unseen, 0.0) for w, row in pairs)


def _halves(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    count = len(tensors) // 2
    return tensors[:count], tensors[count:]


def _check(parts: Any) -> None:
    """Raise a ValueError unless the parts are as `merge_attention` says."""
    if not isinstance(parts, Sequence):
        raise ValueError(f"parts: got {type(parts).__name__}; expected a list; {_HOW}")
    if not parts:
        raise ValueError(f"parts: got none; expected at least one; {_HOW}")
    for number, part in enumerate(parts):
        pair = isinstance(part, Sequence) and len(part) == 2
        if not pair or not all(isinstance(tensor, Tensor) for tensor in part):
            raise ValueError(
                f"parts[{number}]: got {_kind(part)}; expected a pair of tensors; {_HOW}"
            )
    first = parts[0][0]
    _check_first(first)
    for number, (out, lse) in enumerate(parts):
        _check_part(number, out, lse, first)


def _check_first(out: Tensor) -> None:
    if out.dim() != 4:
        raise ValueError(
            f"parts[0]: got out of shape {list(out.shape)}; expected [batch, seqlen_q, num_heads, "
            "head_dim]; transpose what has its heads first"
        )
    if str(out.dtype).removeprefix("torch.") not in FLOATS:
        expected = ", ".join(f"torch.{dtype}" for dtype in FLOATS)
        raise ValueError(
            f"parts[0]: got out {out.dtype}; expected one of {expected}; convert it with .to(...)"
        )


def _check_part(number: int, out: Tensor, lse: Tensor, first: Tensor) -> None:
    if _traits(out) != _traits(first):
        raise ValueError(
            f"parts[{number}]: got out {_described(out)}; expected {_described(first)} as in "
            "parts[0]: the same queries, on one device; convert it with .to(...)"
        )
    batch, seqlen, heads, _ = first.shape
    shape, dtype = torch.Size((batch, heads, seqlen)), accumulation_dtype(first.dtype)
    if _traits(lse) != (shape, dtype, first.device):
        raise ValueError(
            f"parts[{number}]: got lse {_described(lse)} for out {_described(out)}; expected "
            f"[batch, num_heads, seqlen_q] = {list(shape)} {dtype} on {first.device}; pass "
            "lse as its attention returned it, unrounded"
        )


def _traits(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _kind(part: Any) -> str:
    if isinstance(part, Sequence) and not isinstance(part, str):
        return f"({', '.join(type(each).__name__ for each in part)})"
    return type(part).__name__
