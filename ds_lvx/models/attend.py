"""One layer's attention in a patched model, by the method that its rule or the planner chose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ds_lvx.attention import recompute
from ds_lvx.attention.auto import NOTES, Choice, decide
from ds_lvx.attention.call import Call
from ds_lvx.attention.layout import Layout
from ds_lvx.attention.replay import recording
from ds_lvx.attention.shape import AttentionShape
from ds_lvx.config.registry import AUTO, METHODS
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
    return attend_part(
        plan,
        batch,
        q,
        features=features,
        project_kv=project_kv,
        trains=trains,
        kv_heads=kv_heads,
        scale=scale,
        returns_lse=False,
    )[0]


def attend_to(
    plan: LayerPlan,
    batch: ShardedBatch,
    q: Tensor,
    keys: tuple[Tensor, Tensor],
    *,
    scale: float,
) -> Tensor:
    """`attend` where K and V are made already.

    Args:
        plan, batch, q, scale: as in `attend`.
        keys: K and V ``[B, s_kv, H_kv, D]``.
    """
    k, v = keys
    kv_heads, head_dim = k.shape[2:]
    return attend(
        plan,
        batch,
        q,
        features=k.new_empty(0, kv_heads * head_dim),  # the planner asks how wide they are
        project_kv=lambda _: keys,
        trains=k.requires_grad or v.requires_grad,
        kv_heads=kv_heads,
        scale=scale,
    )


def attend_part(
    plan: LayerPlan,
    batch: ShardedBatch,
    q: Tensor,
    *,
    features: Tensor,
    project_kv: Callable[[Tensor], tuple[Tensor, Tensor]],
    trains: bool,
    kv_heads: int,
    scale: float,
    returns_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """`attend` as a part for `ds_lvx.merge_attention`, by another method than Ulysses.

    Args:
        plan, batch, q, features, project_kv, trains, kv_heads, scale: as in `attend`.
        returns_lse: somebody reads lse, and may give it a gradient.

    Returns:
        out ``[B, s, H, D]``, lse ``[B, H, s]``.
    """
    decoding = batch.decoding
    if decoding is not None and plan.kind == "cross":
        return decoding.attend(
            plan,
            batch.layout(plan.kind),
            q,
            project_kv=project_kv,
            scale=scale,
            returns_lse=returns_lse,
            schedule="gather" if batch.split else "replicated",
        )
    if decoding is not None and batch.past > 0:
        return decoding.attend_further(plan, batch.text, q, project_kv(features), scale=scale)
    if decoding is not None and batch.behind:
        return decoding.attend_behind(
            plan, batch.text, q, project_kv(features), scale=scale, is_recent=batch.is_recent
        )
    layout = batch.layout(plan.kind)
    method, schedule = _resolved(plan, layout, q, kv_heads=kv_heads, width=features.shape[-1])
    # A projection that runs again in backward knows only there who wants a gradient.
    wanted = plan.recompute_kv or trains or q.requires_grad or features.requires_grad
    call = Call(
        layout,
        kernel=layout.kernel(plan.kernel, q),
        softmax_scale=scale,
        schedule=schedule,
        requires_grad=wanted and torch.is_grad_enabled(),
        returns_lse=returns_lse,
        hybrid=plan.hybrid,
    )
    if decoding is not None:  # of a prompt that is split, whose keys stay for a while
        keys = project_kv(features)
        decoding.hold(plan, q, keys)
        return _attend_kept(method, call, q, *keys)
    if plan.recompute_kv:
        return recompute.attend_recompute(
            call,
            q,
            features,
            project_kv,
            kv_chunk_tokens=plan.chunk_tokens(),
            shared=batch.features_gradient if plan.kind == "cross" else None,
            turns=plan.turns,
        )
    return _attend_kept(method, call, q, *project_kv(features))


def _attend_kept(method: str, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to K and V that autograd keeps for backward."""
    # "none" gets here in a group of one rank only, where ring attention is the local one.
    entry = METHODS[method if METHODS[method].distributed else "ring"]
    out, lse = entry.load()(call, q, k, v)
    if not any(call.kv_lengths):
        # Sums over nothing: they tie the projections to the graph, for gradients of 0 and not none.
        out = out + k.sum() + v.sum()
    return out, lse


def _resolved(
    plan: LayerPlan, layout: Layout, q: Tensor, *, kv_heads: int, width: int
) -> tuple[str, str]:
    """Method and schedule, where the plan leaves them to the planner: once a batch for a kind."""
    wanted = plan.wanted
    if not wanted.is_open or layout.channel.size == 1:
        method = "lvx" if plan.method == AUTO else plan.method
        return method, "gather" if plan.schedule == AUTO else plan.schedule
    # Not whether this rank wants a gradient: the answer must be the same on all ranks, and in both
    # passes of a checkpoint.
    backward = torch.is_grad_enabled() or recording()

    def settle() -> tuple[AttentionShape, Choice]:
        shape = AttentionShape(
            batch=q.shape[0],
            q_lengths=layout.q_lengths,
            kv_lengths=layout.kv_lengths,
            heads=q.shape[2],
            kv_heads=kv_heads,
            head_dim=q.shape[3],
            element_bytes=q.element_size(),
            recompute=plan.recompute_kv,
            backward=backward,
            features_dim=width,
        )
        return shape, decide(wanted, shape, layout.channel, q.device)

    kind = ("method", wanted, q.shape, q.dtype, kv_heads, width, backward)
    shape, choice = layout.settled(kind, settle)
    if plan.method == AUTO:
        NOTES.about(choice, shape, name=plan.names, rank=layout.channel.rank)
    method = choice.method if plan.hybrid is None else plan.method
    return method, choice.schedule
