"""Ulysses inside subgroups of adjacent ranks, ring attention or lvx across them.

Ulysses sends least where links are fast, and ends at as many ranks as there are heads; ring and lvx
know no such end. So the ranks of a node split the heads, and what crosses nodes goes by the other
method (USP has the scheme for ring attention: Fang and Zhao, arXiv:2405.07719)::

    ranks 0 1 2 3, ulysses 2       inside: [0 1] [2 3]        across: [0 2] [1 3]

Legend: n ranks, u of them in a subgroup, m = n / u subgroups; s tokens of a rank; H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ds_lvx.attention import lvx, ring
from ds_lvx.attention.call import Call, Group
from ds_lvx.attention.heads import divided, to_heads, to_sequence
from ds_lvx.attention.order import Arrival, Places
from ds_lvx.attention.replay import once
from ds_lvx.attention.settle import settle
from ds_lvx.attention.shape import Hybrid, check_heads
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.subgroups import Divisions
from ds_lvx.kernels.visibility import Visibility

_ACROSS = {"ring": ring.attend, "lvx": lvx.attend}


@overload
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ulysses: int,
    across: str = ...,
    group: Group = ...,
    visibility: Visibility | None = ...,
    softmax_scale: float | None = ...,
    schedule: str = ...,
    kernel: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ulysses: int,
    across: str = ...,
    group: Group = ...,
    visibility: Visibility | None = ...,
    softmax_scale: float | None = ...,
    schedule: str = ...,
    kernel: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ulysses: int,
    across: str = "ring",
    group: Group = None,
    visibility: Visibility | None = None,
    softmax_scale: float | None = None,
    schedule: str = "auto",
    kernel: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's queries over all ranks' keys: heads are split inside subgroups.

    Args:
        q, k, v, group, visibility, softmax_scale, kernel, return_lse: as in `lv_xattn`.
        ulysses: adjacent ranks of a subgroup; a divisor of the group's ranks.
        across: ``"ring"``: keys rotate over the subgroups, or ``"lvx"``: queries travel.
        schedule: of lvx: ``"gather"``, ``"ring"`` or ``"auto"``.

    Returns:
        As `lv_xattn`: ``out``, or ``(out, lse)``.

    Raises:
        ValueError, NotImplementedError: bad arguments of any rank, on every rank; among them fewer
            query heads than ``ulysses``, and a size that does not divide the group.
        RuntimeError: a rank is gone or the network failed.

    Collectives: one agreement of 2 KiB on the CPU, and the first time making the subgroups; with s
    queries and t keys on the rank of its subgroup that holds most, H and K heads, a rank sends
    ``(u-1)/u (2 s H + 2 t K) D e`` bytes inside its subgroup, and what `ring_attention` or
    `lv_xattn` send on m ranks with ``u s`` queries, ``u t`` keys and ``1 / u`` of the heads; in
    backward likewise; for visibility once ``(n-1) (8 s + 4 t)``, and ``(u-1)/u 4 s H`` where lse is
    returned, each way.
    """
    call = settle(
        "hybrid_attention",
        q,
        {"k": k, "v": v},
        group=group,
        visibility=visibility,
        softmax_scale=softmax_scale,
        kernel=kernel,
        schedule=schedule,
        return_lse=return_lse,
        hybrid=Hybrid(ulysses, across),
    )
    out, lse = attend(call, q, k, v)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def attend(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """`hybrid_attention` for a call that is settled: ``out``, and lse where the call returns it."""
    hybrid = call.hybrid
    assert hybrid is not None
    inside = Divisions.of(call.channel, hybrid.ulysses).inside
    check_heads(q.shape[2], inside.size)
    rank = call.channel.rank
    padded = divided(
        q,
        k,
        v,
        ranks=inside.size,
        seqlen_q=hybrid.longest(call.q_lengths)[rank],
        seqlen_kv=hybrid.longest(call.kv_lengths)[rank],
    )
    part, arrival = call.across(q.shape[0])
    held = _ToHeads.apply(inside, arrival, call.anchor(q.device), *padded)
    found = _ACROSS[hybrid.across](part, *held)
    results = found[: 1 + call.returns_lse]
    home = _ToSequence.apply(inside, arrival, call.anchor(q.device), *results)
    out = home[0][:, : q.shape[1], : q.shape[2]]
    return out, home[1][:, : q.shape[2], : q.shape[1]] if call.returns_lse else None


class _ToHeads(torch.autograd.Function):
    """``[B, s, H, D]`` of a rank -> ``[B, u s, H / u, D]``, and gradients back.

    Inside a checkpointed layer what arrived is kept: it would have to be sent again.
    """

    @staticmethod
    def forward(
        ctx: Any, inside: Channel, arrival: Arrival, anchor: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.inside, ctx.places = inside, (arrival.queries, arrival.keys, arrival.keys)
        return once("hybrid_attention's heads", lambda: _heads(inside, tensors, ctx.places))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, None, *_sequence(ctx.inside, gradients, ctx.places)


class _ToSequence(torch.autograd.Function):
    """out ``[B, u s, H / u, D]``, and lse ``[B, H / u, u s]`` -> those of this rank's queries."""

    @staticmethod
    def forward(
        ctx: Any, inside: Channel, arrival: Arrival, anchor: Tensor, *found: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.inside, ctx.places = inside, [arrival.queries] * len(found)
        return once(
            "hybrid_attention's result",
            lambda: _as_found(_sequence(inside, _with_tokens(found), ctx.places)),
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        found = _heads(ctx.inside, _with_tokens(gradients), ctx.places)
        return None, None, None, *_as_found(found)


def _heads(
    inside: Channel, tensors: tuple[Tensor, ...], places: Sequence[Places | None]
) -> tuple[Tensor, ...]:
    return tuple(to_heads(inside, tensors, places)) if inside.size > 1 else tensors


def _sequence(
    inside: Channel, tensors: tuple[Tensor, ...], places: Sequence[Places | None]
) -> tuple[Tensor, ...]:
    if inside.size == 1:
        return tensors
    return tuple(part.flatten(2, 3) for part in to_sequence(inside, tensors, places).wait())


def _with_tokens(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """out, and lse as if it were of heads of one number: ``[B, s, H, 1]``."""
    return found[0], *(lse.transpose(1, 2).unsqueeze(3) for lse in found[1:])


def _as_found(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The reverse."""
    return tensors[0], *(lse.squeeze(3).transpose(1, 2).contiguous() for lse in tensors[1:])
