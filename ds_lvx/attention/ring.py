"""Ring attention: queries stay, keys and values rotate (Liu et al., arXiv:2310.01889).

The peer to compare with, and the method for text layers whose heads do not divide. Its bytes grow
with S_kv, where lvx's grow with S_q.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ds_lvx.attention.call import Call, Group
from ds_lvx.attention.keys import Saved
from ds_lvx.attention.lvx import saved_for
from ds_lvx.attention.replay import once
from ds_lvx.attention.settle import settle
from ds_lvx.distributed.bundles import Bundle, Spec
from ds_lvx.distributed.pending import Pending
from ds_lvx.kernels.interface import Upstream
from ds_lvx.kernels.merge import accumulation_dtype
from ds_lvx.kernels.rule import Rule
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
    dv), and once ``4 (n-1) t`` for visibility. The next keys travel while a block is computed.
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
    out, lse = attend(call, q, k, v)
    return (out, lse) if return_lse else out


def attend(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`ring_attention` for a call that is settled: ``(out, lse)``."""
    if not torch.is_grad_enabled():
        return _forward(call, q, k, v)
    out, lse = _RingAttention.apply(call, call.anchor(q.device), q, k, v)
    return out, lse


class _RingAttention(torch.autograd.Function):
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
        saved = saved_for(q, out, lse, dout, dlse)
        dq, dk, dv = _backward(ctx.call, saved, k, v)
        return None, None, dq.to(q.dtype), dk, dv


def _forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return once("ring_attention's attention", lambda: _attended(call, q, k, v))


def _attended(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    keys: Bundle = [k, v]
    dtype = accumulation_dtype(q.dtype)
    for step in range(call.channel.size):
        following = _next_keys(call, keys, step)
        partial = call.channel.size > 1
        problem = call.problem(q, keys[0], keys[1], _rule(call, step), partial=partial)
        if step == 0:
            out, lse = call.kernel.forward(problem)
            # What `fold` writes to; a kernel's own may lie like q, whose heads may come first.
            out, lse = out.to(dtype).contiguous(), lse.to(dtype).contiguous()
        else:
            call.kernel.fold(problem, (out, lse))
        if following is not None:
            keys = following.wait()
    return out.to(q.dtype), lse


def _backward(call: Call, saved: Saved, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each block's dk and dv go straight home and add up there, in fp32."""
    channel = call.channel
    dtype = accumulation_dtype(k.dtype)
    keys: Bundle = [k, v]
    returning: Pending[Bundle] | None = None
    total = torch.zeros(saved.q.shape, dtype=dtype, device=saved.q.device)
    home: list[Tensor] = []
    upstream = Upstream(saved.dout, saved.lse, saved.delta, has_dlse=call.returns_lse)
    for step in range(channel.size):
        following = _next_keys(call, keys, step)
        problem = call.problem(saved.q, keys[0], keys[1], _rule(call, step))
        dq, dk, dv = call.kernel.backward(problem, upstream)
        total += dq
        if step == 0:
            home = [dk.to(dtype), dv.to(dtype)]
        else:
            if returning is not None:
                _add_to(home, returning.wait())
            specs = [Spec.of(k), Spec.of(v)]
            returning = channel.shift([dk.to(k.dtype), dv.to(v.dtype)], specs, hops=-step)
        del problem, dq, dk, dv  # the next step's need the room
        if following is not None:
            keys = following.wait()
    if returning is not None:
        _add_to(home, returning.wait())
    return total, home[0].to(k.dtype), home[1].to(v.dtype)


def _add_to(totals: list[Tensor], parts: Bundle) -> None:
    for total, part in zip(totals, parts, strict=True):
        total += part


def _owner(call: Call, step: int) -> int:
    """Whose keys are here at a step."""
    return (call.channel.rank - step) % call.channel.size


def _rule(call: Call, step: int) -> Rule | None:
    """This rank's queries over the keys that are here."""
    return call.layout.rule(queries=call.channel.rank, keys=_owner(call, step))


def _next_keys(call: Call, keys: Bundle, step: int) -> Pending[Bundle] | None:
    if step == call.channel.size - 1:
        return None
    rows = call.kv_lengths[_owner(call, step + 1)]
    like = Spec((keys[0].shape[0], rows, *keys[0].shape[2:]), keys[0].dtype)
    return call.channel.shift(keys, [like, like])
