"""DeepSpeed-Ulysses: all-to-alls turn a split sequence into split heads and back.

DeepSpeed's own `DistributedAttention` does the all-to-alls (Jacobs et al., arXiv:2309.14509). What
is added here is what it leaves to its caller: shards of unequal length (padded with keys that
nobody sees), heads that do not divide (repeated or padded), visibility, and S_q != S_kv.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, nn

from ds_lvx.attention.call import Call, Group, settle
from ds_lvx.attention.common import LocalAttention
from ds_lvx.bundles import Spec
from ds_lvx.comm import Channel
from ds_lvx.counting import count
from ds_lvx.start import init_distributed
from ds_lvx.visibility import EVERYTHING, Visibility


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
    return attend(call, q, k, v, visibility)


def check_heads(num_heads: int, sp_size: int) -> None:
    """Raise a ValueError where Ulysses has fewer query heads than ranks."""
    if num_heads < sp_size:
        raise ValueError(
            f"ulysses: got {num_heads} query heads for {sp_size} ranks; expected at least one "
            "head a rank; use a smaller sequence_parallel_size, or the methods 'lvx' or 'ring'"
        )


def attend(call: Call, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility | None) -> Tensor:
    """`ulysses_attention` for a call that is settled."""
    channel = call.channel
    if channel.size == 1:
        return LocalAttention.apply(call, visibility, q, k, v)[0]
    seqlen_q, seqlen_kv = max(call.q_lengths), max(call.kv_lengths)
    uneven = len(set(call.q_lengths)) > 1 or len(set(call.kv_lengths)) > 1
    if uneven and visibility is None:
        batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
        visibility = Visibility.all(batch, queries, keys, device=q.device)
    whole = None if visibility is None else _whole(channel, visibility, seqlen_q, seqlen_kv)
    if call.requires_grad:
        # The all-to-alls of q, k and v each run backward on every rank or on none.
        anchor = call.anchor(q.device).to(q.dtype)
        q, k, v = (t if t.requires_grad else t + anchor for t in (q, k, v))
    if seqlen_q == 0 or seqlen_kv == 0:
        return _nothing(q, k, v)
    repeats, padding = _head_layout(q.shape[2], k.shape[2], channel.size)
    padded_q = _pad(q, seqlen_q, padding * (q.shape[2] // (k.shape[2] * repeats)))
    padded_k, padded_v = (
        _pad(t.repeat_interleave(repeats, dim=2) if repeats > 1 else t, seqlen_kv, padding)
        for t in (k, v)
    )
    out = _all_to_all(call, padded_q, padded_k, padded_v, whole)
    return out[:, : q.shape[1], : q.shape[2]]


def _nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention of no query, or to no key: zeros that pass a gradient of 0 to all three."""
    ties = sum(tensor.flatten()[:0].sum() for tensor in (q, k, v))
    return torch.zeros_like(q) + ties


def _all_to_all(
    call: Call, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility | None
) -> Tensor:
    _ensure_deepspeed_comm()
    attention = DistributedAttention(_Local(call), call.channel.group, scatter_idx=2, gather_idx=1)
    q, k, v = (_Counted.apply(call.channel, tensor) for tensor in (q, k, v))
    return _Counted.apply(call.channel, attention(q, k, v, 0, visibility=visibility))


class _Local(nn.Module):
    """What runs between the all-to-alls: all queries and keys, this rank's heads."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, visibility: Visibility | None) -> Tensor:
        out: Tensor = LocalAttention.apply(self._call, visibility, q, k, v)[0]
        return out


class _Counted(torch.autograd.Function):
    """The identity; counts the all-to-all of a tensor, in forward and in backward.

    DeepSpeed sends behind our back, so its bytes are counted where its tensors pass by.
    """

    @staticmethod
    def forward(ctx: Any, channel: Channel, tensor: Tensor) -> Tensor:
        ctx.sent = channel.size, tensor.nbytes
        _count(*ctx.sent)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        _count(*ctx.sent)
        return None, gradient


def _count(ranks: int, nbytes: int) -> None:
    count("all_to_all", (ranks - 1) * nbytes // ranks)


def _whole(channel: Channel, visibility: Visibility, seqlen_q: int, seqlen_kv: int) -> Visibility:
    """The visibility of the whole padded sequence, on every rank."""
    queries = seqlen_q - visibility.q_start.shape[1]
    keys = seqlen_kv - visibility.kv_pos.shape[1]
    padded = [
        F.pad(visibility.ranges, (0, queries)),  # [0, 0): a padded query sees nothing
        F.pad(visibility.kv_pos, (0, keys), value=EVERYTHING),  # and a padded key is seen by none
    ]
    specs = [[Spec.of(tensor) for tensor in padded]] * channel.size
    bundles = channel.gather(padded, specs).wait()
    ranges = torch.cat([bundle[0] for bundle in bundles], dim=2)
    return Visibility(ranges[0], ranges[1], torch.cat([bundle[1] for bundle in bundles], dim=1))


def _head_layout(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    """How often to repeat K and V heads, and how many heads of zeros to add then.

    With fewer K/V heads than ranks each is repeated, by the least factor that gives every rank
    one and keeps groups of query heads whole; what still does not divide is padded.
    """
    group = num_heads // num_kv_heads
    factors = [f for f in range(1, group + 1) if group % f == 0]
    enough = [f for f in factors if num_kv_heads * f >= ranks]
    even = [f for f in enough if num_kv_heads * f % ranks == 0]
    repeats = even[0] if num_kv_heads < ranks and even else enough[0]
    return repeats, -num_kv_heads * repeats % ranks


def _pad(tensor: Tensor, seqlen: int, heads: int) -> Tensor:
    missing = seqlen - tensor.shape[1]
    return F.pad(tensor, (0, 0, 0, heads, 0, missing)) if missing or heads else tensor


def _ensure_deepspeed_comm() -> None:
    # DistributedAttention talks through deepspeed.comm, which a script without an engine may not
    # have started; it takes over the process group that is there.
    if not deepspeed.comm.is_initialized():
        init_distributed(verbose=False)
