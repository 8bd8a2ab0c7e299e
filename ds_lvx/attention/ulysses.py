"""DeepSpeed-Ulysses: all-to-alls turn a split sequence into split heads and back.

DeepSpeed's own `single_all_to_all` sends (Jacobs et al., arXiv:2309.14509). What is added here is
what its `DistributedAttention` leaves to the caller: shards of unequal length (padded with keys
that nobody sees), heads that do not divide (repeated or padded), visibility, S_q != S_kv, and a
checkpointed layer that sends nothing twice.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.sequence.layer import single_all_to_all
from torch import Tensor

from ds_lvx.attention.call import Call, Group, settle
from ds_lvx.attention.common import LocalAttention, delta_of
from ds_lvx.attention.replay import once
from ds_lvx.attention.shape import head_layout
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.pending import blocking
from ds_lvx.distributed.start import init_distributed
from ds_lvx.distributed.traffic import count
from ds_lvx.kernels.interface import Upstream
from ds_lvx.kernels.visibility import Visibility


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group = None,
    visibility: Visibility | None = None,
    softmax_scale: float | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Attention of this rank's queries over all ranks' keys, by all-to-alls over the heads.

    Args:
        q, k, v, group, visibility, softmax_scale, kernel: as in `lv_xattn`.

    Returns:
        ``out``, q's shape and dtype.

    Raises:
        ValueError, NotImplementedError: bad arguments of any rank, on every rank; among them fewer
            query heads than ranks, which leaves a rank without work.
        RuntimeError: a rank is gone or the network failed.

    Collectives: one agreement of 2 KiB on the CPU; with n ranks, s queries and t keys on the rank
    that holds most, H and K heads, a rank sends ``(n-1)/n (2 s H + 2 t K) D e`` bytes, and the same
    in backward; for visibility once ``(n-1) (8 s + 4 t)``. Where K is no multiple of n, K and V
    are first repeated (up to one head a rank) and padded with heads of zeros.
    """
    call = settle(
        "ulysses_attention",
        q,
        {"k": k, "v": v},
        group=group,
        visibility=visibility,
        softmax_scale=softmax_scale,
        kernel=kernel,
    )
    check_heads(q.shape[2], call.channel.size)
    return attend(call, q, k, v)[0]


def check_heads(num_heads: int, sp_size: int) -> None:
    """Raise a ValueError where Ulysses has fewer query heads than ranks."""
    if num_heads < sp_size:
        raise ValueError(
            f"ulysses: got {num_heads} query heads for {sp_size} ranks; expected at least one "
            "head a rank; use a smaller sequence_parallel_size, or the methods 'lvx' or 'ring'"
        )


def attend(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """`ulysses_attention` for a call that is settled: ``out``, and no lse but in a group of one."""
    channel = call.channel
    if channel.size == 1:
        out, lse = LocalAttention.apply(call, q, k, v)
        return out, lse
    seqlen_q, seqlen_kv = max(call.q_lengths), max(call.kv_lengths)
    if seqlen_q == 0 or seqlen_kv == 0:
        return _nothing(q, k, v), None
    repeats, padding = head_layout(q.shape[2], k.shape[2], channel.size)
    padded_q = _pad(q, seqlen_q, padding * (q.shape[2] // (k.shape[2] * repeats)))
    padded_k, padded_v = (
        _pad(t.repeat_interleave(repeats, dim=2) if repeats > 1 else t, seqlen_kv, padding)
        for t in (k, v)
    )
    anchor = call.anchor(q.device)
    out = _UlyssesAttention.apply(call, anchor, padded_q, padded_k, padded_v)
    return out[:, : q.shape[1], : q.shape[2]], None


def _nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention of no query, or to no key: zeros that pass a gradient of 0 to all three."""
    ties = sum(tensor.flatten()[:0].sum() for tensor in (q, k, v))
    return torch.zeros_like(q) + ties


class _UlyssesAttention(torch.autograd.Function):
    """All queries and keys, this rank's heads, between all-to-alls.

    Inside a checkpointed layer everything that backward needs is kept from the first pass, K and V
    of this rank's heads included: without them they would have to be sent again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        anchor: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> Tensor:
        rule = call.layout.padded_rule(q.shape[0])

        def attend_by_heads() -> tuple[Tensor, ...]:
            heads_q, heads_k, heads_v = (_to_heads(call.channel, t) for t in (q, k, v))
            out, lse = call.kernel.forward(call.problem(heads_q, heads_k, heads_v, rule))
            out = out.to(q.dtype)
            return heads_q, heads_k, heads_v, out, lse, _to_sequence(call.channel, out)

        *saved, out = once("ulysses_attention's attention", attend_by_heads)
        ctx.save_for_backward(*saved)
        ctx.call, ctx.rule = call, rule
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        channel = ctx.call.channel
        dout = _to_heads(channel, dout)
        upstream = Upstream(dout, lse, delta_of(out, dout, None, lse))
        dq, dk, dv = ctx.call.kernel.backward(ctx.call.problem(q, k, v, ctx.rule), upstream)
        gradients = (dq.to(q.dtype), dk, dv)
        return None, None, *(_to_sequence(channel, gradient) for gradient in gradients)


def _to_heads(channel: Channel, tensor: Tensor) -> Tensor:
    """``[B, s, H, D]`` of this rank's part of the sequence -> ``[B, S, H / n, D]``, all of it."""
    return _all_to_all(channel, tensor, scatter=2, gather=1)


def _to_sequence(channel: Channel, tensor: Tensor) -> Tensor:
    """The way back."""
    return _all_to_all(channel, tensor, scatter=1, gather=2)


def _all_to_all(channel: Channel, tensor: Tensor, *, scatter: int, gather: int) -> Tensor:
    _ensure_deepspeed_comm()
    # DeepSpeed sends behind our back, so its bytes are counted and its waits are told here.
    count("all_to_all", (channel.size - 1) * tensor.nbytes // channel.size)
    with blocking("all_to_all"):
        sent: Tensor = single_all_to_all(tensor.contiguous(), scatter, gather, 0, channel.group)
    return sent


def _pad(tensor: Tensor, seqlen: int, heads: int) -> Tensor:
    missing = seqlen - tensor.shape[1]
    return F.pad(tensor, (0, 0, 0, heads, 0, missing)) if missing or heads else tensor


def _ensure_deepspeed_comm() -> None:
    # It talks through deepspeed.comm, which a script without an engine may not have started; that
    # takes over the process group that is there.
    if not deepspeed.comm.is_initialized():
        init_distributed(verbose=False)
