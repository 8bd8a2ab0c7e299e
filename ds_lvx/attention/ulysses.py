"""DeepSpeed-Ulysses: all-to-alls turn a split sequence into split heads and back.

The scheme is DeepSpeed's (Jacobs et al., arXiv:2309.14509). What is added here is what its
`DistributedAttention` leaves to the caller: shards of unequal length (padded with keys that nobody
sees), heads that do not divide (repeated or padded), visibility, S_q != S_kv, and a checkpointed
layer that sends nothing twice. Nor does it send q, k and v one after the other: what leaves at the
same time is one message a rank, and results of the first heads leave under the last ones' kernel.

Legend: B batch, n ranks, s tokens of a rank and S of all (queries, or keys), H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_lvx.attention.call import Call, Group
from ds_lvx.attention.common import LocalAttention, delta_of
from ds_lvx.attention.heads import divided, rejoined, to_heads, to_sequence
from ds_lvx.attention.replay import once
from ds_lvx.attention.settle import settle
from ds_lvx.attention.shape import check_heads, head_slices, leaving_groups
from ds_lvx.distributed.pending import Pending
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


def attend(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """`ulysses_attention` for a call that is settled: ``out``, and no lse but in a group of one."""
    channel = call.channel
    if channel.size == 1:
        out, lse = LocalAttention.apply(call, q, k, v)
        return out, lse
    seqlen_q, seqlen_kv = max(call.q_lengths), max(call.kv_lengths)
    if seqlen_q == 0 or seqlen_kv == 0:
        return _nothing(q, k, v), None
    padded = divided(q, k, v, ranks=channel.size, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
    out = _UlyssesAttention.apply(call, call.anchor(q.device), *padded)
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
        arrival = call.layout.arrival(q.shape[0])
        rows, keys = arrival.queries, arrival.keys

        def attend_by_heads() -> tuple[Tensor, ...]:
            held = to_heads(call.channel, (q, k, v), (rows, keys, keys))
            outs, lses, returning = [], [], []
            for heads in _groups(call, *held):
                problem = call.problem(*_some_heads(heads, *held), arrival.rule)
                out, lse = call.kernel.forward(problem)
                outs.append(out.to(q.dtype))
                lses.append(lse)
                returning.append(to_sequence(call.channel, outs[-1:], [rows]))
            return *held, rejoined(outs, dim=2), rejoined(lses, dim=1), *_all_heads(returning)

        *saved, out = once("ulysses_attention's attention", attend_by_heads)
        ctx.save_for_backward(*saved)
        ctx.call, ctx.arrival = call, arrival
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        call, arrival = ctx.call, ctx.arrival
        places = arrival.queries, arrival.keys, arrival.keys
        (dout,) = to_heads(call.channel, (dout,), places[:1])
        delta = delta_of(out, dout, None, lse)
        returning = []
        for heads in _groups(call, q, k, v):
            rows = heads[0]
            upstream = Upstream(dout[:, :, rows], lse[:, rows], delta[:, rows])
            problem = call.problem(*_some_heads(heads, q, k, v), arrival.rule)
            dq, dk, dv = call.kernel.backward(problem, upstream)
            gradients = dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
            returning.append(to_sequence(call.channel, gradients, places))
            del dq, dk, dv, gradients
        return None, None, *_all_heads(returning)


def _groups(call: Call, q: Tensor, k: Tensor, v: Tensor) -> list[tuple[slice, slice]]:
    """Heads of q, and of k and v, that are attended to together, one group after the other."""
    padded = max(call.q_lengths) * call.channel.size
    sizes = leaving_groups(
        kv_heads=k.shape[2],
        q_bytes=padded * q[:, 0].numel() * q.element_size(),
        on_cpu=q.device.type == "cpu",
    )
    return head_slices(sizes, q.shape[2] // k.shape[2])


def _some_heads(
    heads: tuple[slice, slice], q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q[:, :, heads[0]], k[:, :, heads[1]], v[:, :, heads[1]]


def _all_heads(returning: Sequence[Pending[list[Tensor]]]) -> list[Tensor]:
    """``[B, s, H, D]`` of each tensor whose groups of heads come home."""
    groups = zip(*(pending.wait() for pending in returning), strict=True)
    return [rejoined(parts, dim=3).flatten(2, 3) for parts in groups]
