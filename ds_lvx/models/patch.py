"""Patching instances: a forward of its own for an attention module, hooks, and taking both back.

Nothing here touches a class. A patched module has one more entry in its ``__dict__``; hooks are
objects of the classes below, so that `unpatch` finds them on the model itself, and on a deep copy
of it as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ds_lvx.attention import lvx, recompute, ring, ulysses
from ds_lvx.attention.auto import NOTES, decide
from ds_lvx.attention.call import Call
from ds_lvx.attention.replay import recording
from ds_lvx.comm import Channel
from ds_lvx.kernels import choose
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.plan import Layer, LayerPlan
from ds_lvx.plan.shape import AttentionShape
from ds_lvx.visibility import Visibility

KEYWORD = "ds_lvx"


class ShardedForward:
    """Takes the place of an attention module's ``forward``.

    With a sharded batch (keyword ``ds_lvx``) it runs `sharded`; without one, the module's own
    forward. It refers to its module, so that a deep copy refers to the copy.
    """

    def __init__(self, module: nn.Module, plan: LayerPlan) -> None:
        self.module = module
        self.plan = plan
        # Whoever patched the instance before us (accelerate, for one) gets its place back.
        self.previous = module.__dict__.get("forward")

    def __call__(self, *args: Any, ds_lvx: ShardedBatch | None = None, **kwargs: Any) -> Any:
        if ds_lvx is not None:
            return self.sharded(ds_lvx, *args, **kwargs)
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def sharded(self, batch: ShardedBatch, *args: Any, **kwargs: Any) -> Any:
        """The attention of this rank's shard. A model family fills it in."""
        raise NotImplementedError(f"{type(self).__name__} has no forward for a sharded batch")

    def install(self) -> None:
        """Put this in the place of the module's forward."""
        self.module.forward = self

    def remove(self) -> None:
        """Give the module its forward back."""
        del self.module.__dict__["forward"]
        if self.previous is not None:
            self.module.forward = self.previous


class Hook:
    """Base of the hooks that ds_lvx puts on a model."""

    def undo(self) -> None:
        """What has to happen when the hook is taken off."""
        return


class ScaleLoss(Hook):
    """A forward hook that multiplies the gradient of a sharded batch's loss, not the loss."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], out: Any) -> Any:
        if kwargs.get(KEYWORD) is None or kwargs.get("labels") is None:
            return None
        if isinstance(out, tuple):
            return (scale_gradient(out[0], self.factor), *out[1:])
        out.loss = scale_gradient(out.loss, self.factor)
        return out


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x``, with a gradient ``factor`` times as large."""
    return cast(Tensor, _ScaleGradient.apply(x, factor))


class Patch:
    """A model whose attention runs as planned, until `unpatch`.

    Attributes:
        model: the model that was patched, without wrappers.
        layers: its attention layers.
        plans: how each of them runs.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], plans: Sequence[LayerPlan]
    ) -> None:
        self.model = model
        self.layers = tuple(layers)
        self.plans = tuple(plans)

    def unpatch(self) -> None:
        """Give the model back as it was. Calling it twice is allowed."""
        unpatch(self.model)


def unpatch(model: nn.Module) -> None:
    """Undo everything that ds_lvx did to a model (or to a model inside it), or to a copy of one."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, ShardedForward):
            forward.remove()
        _drop_hooks(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
        _drop_hooks(module._forward_hooks, module._forward_hooks_with_kwargs)


def _drop_hooks(hooks: dict[int, Any], with_kwargs: dict[int, bool]) -> None:
    for key, hook in list(hooks.items()):
        if isinstance(hook, Hook):
            hook.undo()
            del hooks[key]
            with_kwargs.pop(key, None)


def is_patched(model: nn.Module) -> bool:
    """Whether an attention module of the model has a forward of ds_lvx's."""
    return any(isinstance(m.__dict__.get("forward"), ShardedForward) for m in model.modules())


def attend(
    plan: LayerPlan,
    batch: ShardedBatch,
    q: Tensor,
    *,
    features: Tensor,
    project_kv: Callable[[Tensor], tuple[Tensor, Tensor]],
    trains: bool,
    kv_heads: int,
    kv_lengths: tuple[int, ...],
    visibility: Visibility | None,
    scale: float,
) -> Tensor:
    """Run one layer's attention by its planned method.

    Args:
        plan, batch: how the layer runs; what q belongs to.
        q: ``[B, s, H, D]``, this rank's queries.
        features: what K and V are projected from, ``[B, s_kv, hidden]``, this rank's.
        project_kv, trains: features -> K, V ``[B, s_kv, H_kv, D]``; whether its parameters train.
        kv_heads, kv_lengths: H_kv; s_kv by rank.
        visibility: this rank's, or None where every query sees every key.
        scale: factor of the scores.

    Returns:
        ``[B, s, H, D]``.
    """
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
