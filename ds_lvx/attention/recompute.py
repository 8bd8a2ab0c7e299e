"""lvx with K and V projected again in backward: nothing of their size is kept.

The cross-attention layers of these models project K and V from one shared visual tensor. A layer
keeps q, out, lse and a reference to that tensor; backward runs the projection again, under the
transfer of the queries, and pushes dk and dv through it while dq is on its way home, so that the
parameters' own hooks fire (ZeRO 1, 2 and 3 depend on them). LV-XAttn, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ds_lvx.attention.call import Call, Group
from ds_lvx.attention.checks import check_keys
from ds_lvx.attention.features import Chunks, FeatureGradient, chunk_lengths
from ds_lvx.attention.keys import ChunkedKeys, Keys, WholeKeys
from ds_lvx.attention.lvx import saved_for
from ds_lvx.attention.projection import (
    Projection,
    ProjectionAgain,
    ProjectKV,
    Turns,
    is_wanted,
)
from ds_lvx.attention.random_state import Setting
from ds_lvx.attention.replay import once, recording, replaying
from ds_lvx.attention.schedules import schedule_of
from ds_lvx.attention.settle import settle
from ds_lvx.attention.shape import STREAMED_TOKENS
from ds_lvx.config.registry import can_chunk
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.visibility import Visibility


@overload
def lv_xattn_recompute(
    q: Tensor,
    features: Tensor,
    project_kv: ProjectKV,
    *,
    group: Group = ...,
    visibility: Visibility | None = ...,
    softmax_scale: float | None = ...,
    schedule: str = ...,
    kernel: str = ...,
    return_lse: Literal[False] = ...,
    kv_chunk_tokens: int | None = ...,
) -> Tensor: ...


@overload
def lv_xattn_recompute(
    q: Tensor,
    features: Tensor,
    project_kv: ProjectKV,
    *,
    group: Group = ...,
    visibility: Visibility | None = ...,
    softmax_scale: float | None = ...,
    schedule: str = ...,
    kernel: str = ...,
    return_lse: Literal[True],
    kv_chunk_tokens: int | None = ...,
) -> tuple[Tensor, Tensor]: ...


def lv_xattn_recompute(
    q: Tensor,
    features: Tensor,
    project_kv: ProjectKV,
    *,
    group: Group = None,
    visibility: Visibility | None = None,
    softmax_scale: float | None = None,
    schedule: str = "auto",
    kernel: str = "auto",
    return_lse: bool = False,
    kv_chunk_tokens: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`lv_xattn` over ``project_kv(features)``, which runs again in backward instead of being kept.

    Args:
        q: ``[batch, seqlen_q, num_heads, head_dim]``, this rank's queries.
        features: ``[batch, seqlen_kv, ...]``, this rank's visual features, shared by all layers;
            on q's device, or on the host (pinned, to be fast), from which they are streamed in
            chunks of ``kv_chunk_tokens``, 16,384 when None (the schedule is not ``ring`` then).
        project_kv: ``features -> (k, v)``, each ``[batch, seqlen_kv, num_kv_heads, head_dim]`` in
            q's dtype. It runs once in forward and once in backward, with the same random numbers
            and autocast. Parameters that it uses get their gradients in ``.grad``, by way of
            ``torch.autograd.backward`` (``torch.autograd.grad`` does not see them). Anything else
            that needs a gradient must come in through ``features``.
        group, visibility, softmax_scale, schedule, kernel, return_lse: as in `lv_xattn`.
        kv_chunk_tokens: K and V of so many tokens exist at a time; ``project_kv`` runs for each
            chunk, on ``features[:, a:b]``, equally often on every rank. None is all at once. Not
            with schedule ``ring``; ``auto`` is ``gather``.

    Returns:
        As `lv_xattn`. Gradients reach q, features, and every parameter that ``project_kv`` uses.

    Raises:
        ValueError, NotImplementedError: bad arguments of any rank, on every rank; also keys of
            another shape, other heads than on another rank, or an error, from the ``project_kv`` of
            any rank.

    Collectives: those of `lv_xattn`, the first under the projection, in backward the last as well;
    and an agreement of 2 KiB on the CPU after the projection in forward.
    Kept for backward: q, out, lse, the random state, a reference to features, a copy of visibility.
    Source: the paper's section 3.2.
    """
    call = settle(
        "lv_xattn_recompute",
        q,
        {"features": features},
        group=group,
        visibility=visibility,
        softmax_scale=softmax_scale,
        kernel=kernel,
        schedule=schedule,
        return_lse=return_lse,
        kv_chunk_tokens=kv_chunk_tokens,
    )
    # Ranks that agree on a call may still project something else.
    checked = project_kv if replaying() else _agreeing(call.channel, project_kv, q)
    out, lse = attend_recompute(call, q, features, checked, kv_chunk_tokens=kv_chunk_tokens)
    return (out, lse) if return_lse else out


def attend_recompute(
    call: Call,
    q: Tensor,
    features: Tensor,
    project_kv: ProjectKV,
    *,
    kv_chunk_tokens: int | None = None,
    shared: FeatureGradient | None = None,
    turns: Turns | None = None,
) -> tuple[Tensor, Tensor]:
    """`lv_xattn_recompute` for a call that is settled: ``(out, lse)``.

    The call must be settled with ``requires_grad`` wherever gradients are enabled: only the
    projection knows whether its parameters need one. ``shared`` is what `share` returned with the
    features; then their gradient adds up there. ``turns`` belongs to the layer: with it one
    backward may be of several forwards, and hooks of a parameter fire once.
    """
    if kv_chunk_tokens is None and features.device != q.device:
        kv_chunk_tokens = STREAMED_TOKENS
    lengths = chunk_lengths(
        call.kv_lengths, call.channel.rank, kv_chunk_tokens, elsewhere=call.layout.elsewhere
    )
    if len(lengths) > 1 and not can_chunk(call.schedule):
        call = replace(call, schedule="gather")
    asked = _Asked(call, project_kv, lengths, shared, turns)
    out, lse = _LVXRecompute.apply(asked, call.anchor(q.device), q, features)
    return out, lse


@dataclass(eq=False)
class _Asked:
    """What a layer is asked for, beside its tensors.

    Attributes:
        lengths: tokens of each chunk of the features.
        shared, turns: as of `attend_recompute`.
    """

    call: Call
    project_kv: ProjectKV
    lengths: list[int]
    shared: FeatureGradient | None
    turns: Turns | None


class _LVXRecompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, asked: _Asked, anchor: Tensor, q: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        call = asked.call

        def compute() -> tuple[Any, ...]:
            setting = Setting(q) if call.requires_grad or recording() else None
            chunks = Chunks(features, asked.lengths, q.device)
            keys = _keys(Projection(asked.project_kv, chunks), chunks)
            out, lse = schedule_of(call).forward(call, q, keys)
            after = None if setting is None else setting.change()
            return out.to(q.dtype), lse, setting, after

        out, lse, setting, after = once("lv_xattn_recompute's attention", compute)
        if replaying() and after is not None:
            after.restore()  # the projection did not run: what follows it must not notice
        ctx.save_for_backward(q, features, out, lse)
        ctx.asked, ctx.setting = asked, setting
        if asked.turns is not None and call.requires_grad:
            asked.turns.add(ctx)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, features, out, lse = ctx.saved_tensors
        asked, call = ctx.asked, ctx.asked.call
        chunks = Chunks(features, asked.lengths, q.device)
        *_, features_want_gradient = ctx.needs_input_grad
        *_, (features_node, _) = ctx.next_functions
        gradient = None
        if features_want_gradient and is_wanted(features_node):
            gradient = FeatureGradient() if asked.shared is None else asked.shared
            gradient.begin(ctx)
        turns = asked.turns
        projection = ProjectionAgain(
            asked.project_kv,
            chunks,
            playback=ctx.setting.playback(),
            gradient=gradient,
            totals=None if turns is None else turns.totals,
            more=turns is not None and not turns.is_last(ctx),
        )
        saved = saved_for(q, out, lse, dout, dlse)
        del out, lse, dout
        dq = schedule_of(call).backward(call, saved, _keys(projection, chunks))
        own = None if gradient is None or gradient is asked.shared else gradient.take()
        if own is not None and chunks.on_host:
            torch.accelerator.synchronize(q.device)  # autograd adds it up on the host
        return None, None, dq.to(q.dtype), own


def _keys(projection: Projection, chunks: Chunks) -> Keys:
    if len(chunks) > 1:
        return ChunkedKeys(projection)
    return WholeKeys(projection.whole, partial(projection.push, last=True))


def _agreeing(channel: Channel, project_kv: ProjectKV, q: Tensor) -> ProjectKV:
    """``project_kv`` whose first run, in forward, ends on all ranks alike."""
    agreed = False

    def projection(features: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal agreed
        if agreed:
            return project_kv(features)
        try:
            k, v = _checked(q, features, project_kv(features))
        # Whatever it is: the other ranks must not wait for this one.
        except Exception as error:
            channel.agree({}, error)
            raise
        channel.agree_on({"num_kv_heads": k.shape[2]}, what="project_kv")
        agreed = True
        return k, v

    return projection


def _checked(
    q: Tensor, features: Tensor, projected: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    try:
        k, v = projected
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"project_kv: got {type(projected).__name__}; expected it to return (k, v)"
        ) from error
    check_keys(q, k, v)
    if k.shape[1] != features.shape[1]:
        raise ValueError(
            f"project_kv: got {k.shape[1]} keys from {features.shape[1]} tokens of features; "
            "expected one key a token"
        )
    return k, v
