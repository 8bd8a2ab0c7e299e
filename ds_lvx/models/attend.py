"""One layer's attention in a patched model, by the method that its rule or the planner chose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_lvx.attention import lvx, recompute, ring, ulysses
from ds_lvx.attention.auto import NOTES, decide
from ds_lvx.attention.call import Call
from ds_lvx.attention.replay import recording
from ds_lvx.attention.shape import AttentionShape
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels import choose
from ds_lvx.kernels.visibility import Visibility
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.layers import LayerPlan


def attend(
    plan: LayerPlan,
    batch: ShardedBatch,
    q: Tensor,
    *,
    features: Tensor,
    project_kv: Callable[[Tensor], tuple[Tensor, Tensor]],
    trains: bool,
    kv_heads: int,
    scale: float,
) -> Tensor:
    """Run one layer's attention by its planned method.

    Args:
        plan, batch: how the layer runs; what q belongs to, and what there is to attend to.
        q: ``[B, s, H, D]``, this rank's queries.
        features: what K and V are projected from, ``[B, s_kv, hidden]``, this rank's.
        project_kv, trains: features -> K, V ``[B, s_kv, H_kv, D]``; whether its parameters train.
        kv_heads: H_kv.
        scale: factor of the scores.

    Returns:
        ``[B, s, H, D]``.
    """
    kv_lengths, visibility = batch.keys_of(plan.kind)
    shape = _shape(
        q,
        features,
        q_lengths=batch.text_lengths,
        kv_lengths=kv_lengths,
        kv_heads=kv_heads,
        recompute=plan.recompute_kv,
        visibility=visibility is not None,
    )
    method, schedule = _resolved(plan, shape, batch.channel, q.device)
    # A projection that runs again in backward knows only there who wants a gradient.
    wanted = plan.recompute_kv or trains or q.requires_grad or features.requires_grad
    call = Call(
        batch.channel,
        batch.text_lengths,
        kv_lengths,
        kernel=choose(plan.kernel, q),
        softmax_scale=scale,
        schedule=schedule,
        requires_grad=wanted and torch.is_grad_enabled(),
    )
    if plan.recompute_kv:
        return recompute.attend_recompute(
            call,
            q,
            features,
            project_kv,
            visibility,
            kv_chunk_tokens=plan.chunk_tokens(),
            shared=batch.features_gradient if plan.kind == "cross" else None,
            layer=plan.name,
        )[0]
    return _attend_kept(method, call, q, project_kv(features), visibility)


def _attend_kept(
    method: str,
    call: Call,
    q: Tensor,
    keys: tuple[Tensor, Tensor],
    visibility: Visibility | None,
) -> Tensor:
    """Attention to K and V that autograd keeps for backward."""
    k, v = keys
    if method == "ulysses":
        out = ulysses.attend(call, q, k, v, visibility)
    else:
        # "none" gets here in a group of one rank only, where ring attention is the local one.
        out, _ = (lvx if method == "lvx" else ring).attend(call, q, k, v, visibility)
    if not any(call.kv_lengths):
        # Sums over nothing: they tie the projections to the graph, for gradients of 0 and not none.
        out = out + k.sum() + v.sum()
    return out


def _shape(q: Tensor, features: Tensor, **known: Any) -> AttentionShape:
    """This call as the planner is asked about it: only what is the same on every rank."""
    return AttentionShape(
        batch=q.shape[0],
        heads=q.shape[2],
        head_dim=q.shape[3],
        element_bytes=q.element_size(),
        # Not whether this rank wants a gradient: the answer must be the same on all ranks, and in
        # both passes of a checkpoint.
        backward=torch.is_grad_enabled() or recording(),
        features_dim=features.shape[-1],
        **known,
    )


def _resolved(
    plan: LayerPlan, shape: AttentionShape, channel: Channel, device: torch.device
) -> tuple[str, str]:
    """Method and schedule of this call, where the plan leaves them to the planner."""
    choice = decide(plan.wanted(), shape, channel, device)
    if choice is None:
        method = "lvx" if plan.method == "auto" else plan.method
        return method, "gather" if plan.schedule == "auto" else plan.schedule
    if plan.method == "auto":
        NOTES.about(choice, shape, name=plan.name, rank=channel.rank)
    return choice.method, choice.schedule
