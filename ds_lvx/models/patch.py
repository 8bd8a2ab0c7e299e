"""Patching instances: another attention for a module, hooks, and taking both back.

Nothing here touches a class. A patched module has one more entry in its ``__dict__``; that, and
hooks, are objects of the classes below, so that `unpatch` finds them on the model itself, and on a
deep copy of it as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.layers import Layer, LayerPlan

KEYWORD = "ds_lvx"
ATTRIBUTE = "_ds_lvx_attention"
"""Where a `PatchedAttention` lies that is no forward."""


class PatchedAttention:
    """What ds_lvx puts on an attention module. It refers to its module, so that a deep copy refers
    to the copy.

    Attributes:
        ranks: that share a batch; with more than one its module is never called without one.
    """

    ranks: int = 1

    def __init__(self, module: nn.Module, plan: LayerPlan) -> None:
        self.module: Any = module
        self.plan = plan

    def shared(self, given: dict[str, Any]) -> ShardedBatch | None:
        """The batch of a call that is to run sharded; None: by the module's own code.

        Args:
            given: the keywords of the call; ours is taken out.

        Raises:
            ValueError: ours is missing, though the ranks share batches: each would attend to its
                own shard alone.
        """
        if KEYWORD not in given and self.ranks > 1:
            raise ValueError(
                f"got a call of {self.plan.name} without the keyword {KEYWORD!r}, in a model whose "
                f"batches {self.ranks} ranks share; expected the layers of the text model to hand "
                "keywords that they do not know on to their attention: if they do not, the model "
                "family has to carry this one there (docs/adding-a-model.md)"
            )
        batch: ShardedBatch | None = given.pop(KEYWORD, None)
        return batch if batch is not None and batch.shards(self.plan.kind) else None

    def install(self) -> None:
        """Put it on the module."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is installed")

    def remove(self) -> None:
        """Give the module back as it was."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is removed")


class ShardedForward(PatchedAttention):
    """Takes the place of an attention module's ``forward``.

    With a sharded batch (keyword ``ds_lvx``) it runs `sharded`; where that is None, or where every
    rank has all that the layer attends to, the module's own forward.
    """

    def __init__(self, module: nn.Module, plan: LayerPlan) -> None:
        super().__init__(module, plan)
        # Whoever patched the instance before us (accelerate, for one) gets its place back.
        self.previous = module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self.shared(kwargs)
        if batch is not None:
            return self.sharded(batch, *args, **kwargs)
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


class FusedForward(ShardedForward):
    """Of an attention module that projects Q, K and V together.

    Raises:
        NotImplementedError: the plan is to project K and V again.
    """

    def __init__(self, module: Any, plan: LayerPlan) -> None:
        super().__init__(module, plan)
        if plan.recompute_kv:
            raise NotImplementedError(
                f"ds_lvx.layers: got recompute_kv for {plan.name}, whose K and V are projected "
                "together with Q; expected it for cross-attention only: remove it from this rule"
            )


def patched_attention(module: nn.Module) -> PatchedAttention | None:
    """What ds_lvx has put on a module, if anything."""
    found = (module.__dict__.get("forward"), module.__dict__.get(ATTRIBUTE))
    return next((each for each in found if isinstance(each, PatchedAttention)), None)


def is_patched(model: nn.Module) -> bool:
    """Whether an attention module of the model is patched by ds_lvx."""
    return any(patched_attention(module) is not None for module in model.modules())


def is_prepared(model: nn.Module) -> bool:
    """Whether ds_lvx has put anything on a model; on some it patches no attention."""
    return is_patched(model) or any(
        isinstance(hook, Hook)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
    )


def refuse_dropout(dropout: float) -> None:
    """Raise where attention is to drop weights.

    Args:
        dropout: the probability, 0 outside of training.

    Raises:
        NotImplementedError: it is not 0.
    """
    if dropout > 0:
        raise NotImplementedError(
            f"got attention dropout {dropout} while training; the sharded attention has none: set "
            "it to 0 in the model's config"
        )


def refuse_growing_rope(rope: str, sp_size: int) -> None:
    """Raise where rotary frequencies depend on what a rank sees.

    Args:
        rope: transformers' ``rope_type``.
        sp_size: ranks that share a batch.

    Raises:
        NotImplementedError: they do.
    """
    if sp_size > 1 and ("dynamic" in rope or rope == "longrope"):
        raise NotImplementedError(
            f'got rope_type "{rope}", whose frequencies depend on the longest position that a '
            'rank sees; expected "default", "linear", "yarn" or "llama3", or '
            "sequence_parallel_size 1"
        )


def trains(*modules: nn.Module) -> bool:
    """Whether a parameter of the modules wants a gradient; none does where autograd is off."""
    if not torch.is_grad_enabled():
        return False
    return any(p.requires_grad for module in modules for p in module.parameters())


def heads(x: Tensor, head_dim: int) -> Tensor:
    """``[B, s, H * D]`` -> ``[B, s, H, D]``."""
    return x.unflatten(2, (x.shape[2] // head_dim, head_dim))


def fill(
    batch: ShardedBatch, cache: Any, keys: tuple[Tensor, Tensor], *, layer: int
) -> tuple[Tensor, Tensor]:
    """K and V of this rank's text; in generation the cache gets them.

    Args:
        batch: the keyword.
        cache: transformers' own; None outside of generation.
        keys: K and V ``[B, s, H_kv, D]``.
        layer: its number in the cache.

    Returns:
        As they are; in generation what the cache has: of a prompt that is split this rank's part,
        behind one whose keys are sharded all tokens behind it, and of a text that is split behind
        a cache this rank's part behind all that every rank has.
    """
    if batch.decoding is None:
        return keys
    k, v = cache.update(*(each.transpose(1, 2) for each in keys), layer)
    return k.transpose(1, 2), v.transpose(1, 2)


class Hook:
    """Base of the hooks that ds_lvx puts on a model."""

    def undo(self) -> None:
        """What has to happen when the hook is taken off."""
        return


class KeepForward(Hook):
    """A forward pre-hook that does nothing: it puts another forward in the place of a module's, and
    knows which one to put back."""

    def __init__(self, model: Any, forward: Callable[..., Any]) -> None:
        self._model, self._before = model, vars(model).get("forward")
        model.forward = forward

    def __call__(self, module: nn.Module, args: Any) -> None:
        return None

    def undo(self) -> None:
        """Give the model its forward back."""
        vars(self._model).pop("forward", None)
        if self._before is not None:
            self._model.forward = self._before


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
        attention = patched_attention(module)
        if attention is not None:
            attention.remove()
        _drop_hooks(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
        _drop_hooks(module._forward_hooks, module._forward_hooks_with_kwargs)


def _drop_hooks(hooks: dict[int, Any], with_kwargs: dict[int, bool]) -> None:
    for key, hook in list(hooks.items()):
        if isinstance(hook, Hook):
            hook.undo()
            del hooks[key]
            with_kwargs.pop(key, None)
