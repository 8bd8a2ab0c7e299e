"""LV-XAttn: keys and values stay on the rank that made them, queries travel.

Chang and Venkataraman, "LV-XAttn: Distributed Cross-Attention for Long Visual Inputs in Multimodal
Large Language Models", ICML 2025 (arXiv:2502.02406). Here with any visibility, any lengths, GQA,
and gradients for everything upstream.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ds_lvx.attention.call import Call, Group
from ds_lvx.attention.common import delta_of
from ds_lvx.attention.keys import Saved, WholeKeys
from ds_lvx.attention.replay import once
from ds_lvx.attention.schedules import schedule_of
from ds_lvx.attention.settle import settle
from ds_lvx.kernels.visibility import Visibility


@overload
def lv_xattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group = ...,
    visibility: Visibility | None = ...,
    softmax_scale: float | None = ...,
    schedule: str = ...,
    kernel: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def lv_xattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group = ...,
    visibility: Visibility | None = ...,
    softmax_scale: float | None = ...,
    schedule: str = ...,
    kernel: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def lv_xattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group = None,
    visibility: Visibility | None = None,
    softmax_scale: float | None = None,
    schedule: str = "auto",
    kernel: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's queries over all ranks' keys; keys and values are never sent.

    Args:
        q: ``[batch, seqlen_q, num_heads, head_dim]``, this rank's queries; fp32, bf16, fp16, fp64.
        k, v: ``[batch, seqlen_kv, num_kv_heads, head_dim]``, this rank's keys, q's dtype.
            ``num_kv_heads`` divides ``num_heads``. Lengths are free on every rank, 0 included.
        group: a process group, `SequenceParallelGroups`, or None for the current groups' one (the
            world when there are none). A group of one communicates with nobody.
        visibility: which keys the queries see, this rank's shards; None is everything. Given on
            every rank or on none.
        softmax_scale: factor on the scores, above 0; ``head_dim ** -0.5`` when None.
        schedule: ``"gather"``, ``"ring"``, ``"replicated"`` (every rank holds the same queries and
            does the same with the result; dout is the same on every rank, and so is dq), or
            ``"auto"``: what the planner predicts to be faster of gather and ring, and ring above
            1 GiB of gathered queries.
        kernel: ``"native"``, ``"flash"``, ``"cudnn"``, ``"triton"``, ``"triton_atomic"``,
            ``"reference"`` or ``"auto"``: native on a CPU, on CUDA by the table that ``ds-lvx
            doctor --tune`` made, else by rule.
        return_lse: also return lse, differentiable.

    Returns:
        ``out``, q's shape and dtype; with ``return_lse`` also ``lse``, fp32
        ``[batch, num_heads, seqlen_q]``. A query that sees nothing: out = 0, lse = -inf.

    Raises:
        ValueError, NotImplementedError: bad arguments of any rank, on every rank.
        RuntimeError: a rank is gone or the network failed.

    Collectives: one agreement of 2 KiB on the CPU (two at a group's first call with ``auto``); then
    a rank sends ``(n-1) s H (2 D e + 4)`` bytes in forward and ``(n-1) s H (3 D e + 8)`` in
    backward, and once ``8 (n-1) s`` for visibility (a sample; n ranks, s = seqlen_q, e bytes an
    element; bf16 adds up to ``16 (n-1) s``, ``gather`` pads each tensor's part of a row to 16
    bytes). ``replicated`` sends instead ``(n-1) s H (4 D + 4)`` where out in fp32 of all ranks is
    up to 1 MiB, else ``(n-1) s H 4`` and an all-reduce of ``s H D`` fp32, in forward; the latter
    alone in backward. Every rank must run backward.

    Source: the paper's section 3.1; the gather schedule and visibility are ours.
    """
    call = settle(
        "lv_xattn",
        q,
        {"k": k, "v": v},
        group=group,
        visibility=visibility,
        softmax_scale=softmax_scale,
        kernel=kernel,
        schedule=schedule,
        return_lse=return_lse,
    )
    out, lse = attend(call, q, k, v)
    return (out, lse) if return_lse else out


def attend(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`lv_xattn` for a call that is settled: ``(out, lse)``."""
    if not torch.is_grad_enabled():  # a generation's token: no graph to make
        return _forward(call, q, k, v)
    out, lse = _LVXAttention.apply(call, call.anchor(q.device), q, k, v)
    return out, lse


def _forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    def compute() -> tuple[Tensor, Tensor]:
        keys = WholeKeys(lambda: (k, v), kv_heads=k.shape[2])
        out, lse = schedule_of(call).forward(call, q, keys)
        return out.to(q.dtype), lse

    return once("lv_xattn's attention", compute)


class _LVXAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        anchor: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(call, q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        gradients: list[Tensor] = []
        keys = WholeKeys(lambda: (k, v), gradients.extend, kv_heads=k.shape[2])
        saved = saved_for(q, out, lse, dout, dlse)
        dq = schedule_of(ctx.call).backward(ctx.call, saved, keys)
        return None, None, dq.to(q.dtype), *gradients


def saved_for(
    q: Tensor, out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None
) -> Saved:
    """What a schedule's backward starts from."""
    delta = delta_of(out, dout, dlse, lse)
    return Saved(q, torch.zeros_like(out) if dout is None else dout, lse, delta)
