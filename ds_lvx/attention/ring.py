"""Ring attention: queries stay, keys and values rotate (Liu et al., arXiv:2310.01889).

The peer to compare with, and the method for text layers whose heads do not divide. Its bytes grow
with S_kv, where lvx's grow with S_q.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ds_lvx.attention.call import Call, Group, settle
from ds_lvx.attention.keys import Saved
from ds_lvx.attention.lvx import saved_for
from ds_lvx.attention.replay import once
from ds_lvx.distributed.bundles import Bundle, Spec
from ds_lvx.distributed.pending import Pending
from ds_lvx.kernels.merge import accumulation_dtype
from ds_lvx.kernels.visibility import Visibility


@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group = ...,
    visibility: Visibility | None = ...,
    softmax_scale: float | None = ...,
    kernel: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group = ...,
    visibility: Visibility | None = ...,
    softmax_scale: float | None = ...,
    kernel: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group = None,
    visibility: Visibility | None = None,
    softmax_scale: float | None = None,
    kernel: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's queries over all ranks' keys; keys and values rotate.

    Args:
        q, k, v, group, visibility, softmax_scale, kernel, return_lse: as in `lv_xattn`.

    Returns:
        As `lv_xattn`: ``out``, or ``(out, lse)``.

    Raises:
        ValueError, NotImplementedError: bad arguments of any rank, on every rank.
        RuntimeError: a rank is gone or the network failed.

    Collectives: one agreement of 2 KiB on the CPU. With t keys a rank and K key/value heads, a rank
    sends ``2 (n-1) t K D e`` bytes in forward and ``4 (n-1) t K D e`` in backward (k and v, dk and
    dv), plus ``4 (n-1) t`` for visibility. The next keys travel while a block is computed.
    """
    call = settle(
        "ring_attention",
        q,
        {"k": k, "v": v},
        group=group,
        visibility=visibility,
        softmax_scale=softmax_scale,
        kernel=kernel,
        return_lse=return_lse,
    )
    out, lse = attend(call, q, k, v, visibility)
    return (out, lse) if return_lse else out


def attend(
    call: Call, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility | None
) -> tuple[Tensor, Tensor]:
    """`ring_attention` for a call that is settled: ``(out, lse)``."""
    out, lse = _RingAttention.apply(call, visibility, call.anchor(q.device), q, k, v)
    return out, lse


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        visibility: Visibility | None,
        anchor: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out, lse = once("ring_attention's attention", lambda: _forward(call, q, k, v, visibility))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call, ctx.visibility = call, visibility
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        saved = saved_for(q, out, lse, dout, dlse)
        dq, dk, dv = _backward(ctx.call, saved, k, v, ctx.visibility)
        return None, None, None, dq.to(q.dtype), dk, dv


def _forward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility | None
) -> tuple[Tensor, Tensor]:
    keys: Bundle = [k, v, *_positions(visibility)]
    dtype = accumulation_dtype(q.dtype)
    for step in range(call.channel.size):
        following = _next_keys(call, keys, step)
        seen, scale = _over(visibility, keys), call.softmax_scale
        block = keys[0], keys[1]
        if step == 0:
            partial = call.channel.size > 1
            out, lse = call.kernel.forward(
                q, *block, visibility=seen, softmax_scale=scale, partial=partial
            )
            out, lse = out.to(dtype), lse.to(dtype)
        else:
            call.kernel.fold(q, *block, (out, lse), visibility=seen, softmax_scale=scale)
        if following is not None:
            keys = following.wait()
    return out.to(q.dtype), lse


def _backward(
    call: Call, saved: Saved, k: Tensor, v: Tensor, visibility: Visibility | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Each block's dk and dv go straight home and add up there, in fp32."""
    channel = call.channel
    dtype = accumulation_dtype(k.dtype)
    keys: Bundle = [k, v, *_positions(visibility)]
    returning: Pending[Bundle] | None = None
    total = torch.zeros(saved.q.shape, dtype=dtype, device=saved.q.device)
    home: list[Tensor] = []
    for step in range(channel.size):
        following = _next_keys(call, keys, step)
        dq, dk, dv = call.kernel.backward(
            saved.q,
            keys[0],
            keys[1],
            saved.dout,
            saved.lse,
            saved.delta,
            visibility=_over(visibility, keys),
            softmax_scale=call.softmax_scale,
            has_dlse=call.returns_lse,
        )
        total += dq
        if step == 0:
            home = [dk.to(dtype), dv.to(dtype)]
        else:
            if returning is not None:
                _add_to(home, returning.wait())
            specs = [Spec.of(k), Spec.of(v)]
            returning = channel.shift([dk.to(k.dtype), dv.to(v.dtype)], specs, hops=-step)
        del dq, dk, dv  # the next step's need the room
        if following is not None:
            keys = following.wait()
    if returning is not None:
        _add_to(home, returning.wait())
    return total, home[0].to(k.dtype), home[1].to(v.dtype)


def _add_to(totals: list[Tensor], parts: Bundle) -> None:
    for total, part in zip(totals, parts, strict=True):
        total += part


def _next_keys(call: Call, keys: Bundle, step: int) -> Pending[Bundle] | None:
    if step == call.channel.size - 1:
        return None
    rows = call.kv_lengths[(call.channel.rank - step - 1) % call.channel.size]
    specs = [_keys_like(keys[0], rows)] * 2
    if len(keys) == 3:
        specs.append(Spec((keys[0].shape[0], rows), torch.int32))
    return call.channel.shift(keys, specs)


def _keys_like(k: Tensor, rows: int) -> Spec:
    return Spec((k.shape[0], rows, *k.shape[2:]), k.dtype)


def _positions(visibility: Visibility | None) -> Bundle:
    return [] if visibility is None else [visibility.kv_pos]


def _over(visibility: Visibility | None, keys: Bundle) -> Visibility | None:
    return None if visibility is None else visibility.with_keys(keys[2])
