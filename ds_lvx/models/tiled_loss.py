"""Logits and loss by pieces of the sequence: no rank holds the logits of all its tokens.

A model calls its head on all states of the text, and makes a loss of the logits. With more tiles
than one and labels to learn from, the head keeps the states and returns the logits of no token;
where the loss is asked for, it is called again, and gives the sum of the cross-entropies, a tile
after the other. Backward computes the logits of each tile again. DeepSpeed's `TiledFusedLogitsLoss`
takes the gradients in forward, for a gradient of the loss of 1; here it is the real one, which
gradient accumulation and ZeRO-3 scale.

The head is called as a module, and its weights are inputs of the tiles' Function: ZeRO gathers them
once a pass, and a weight that the embeddings share gets its gradient in one piece.

Legend: B samples, s tokens of this rank, V words, N tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ds_lvx.attention.random_state import Setting
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.cuts import split
from ds_lvx.models.patch import KEYWORD, Hook
from ds_lvx.models.text import IGNORED_LABEL, ITEMS_KEY

_LOSS = "_loss_function"
_SHIFTED = "shift_labels"


def share_of_loss(head: Any, logits: Tensor, labels: Tensor, items: float) -> Tensor:
    """A rank's share of a batch's loss: the sum of its cross-entropies over ``items``.

    Args:
        head: the module that made the logits.
        logits: ``[B, s, V]``, or those of no token, where the head has kept the states.
        labels: ``[B, s]``, shifted, -100 where nothing is learnt.
        items: what the sum is divided by.
    """
    tiled = _tiled(head)
    if tiled is not None and tiled.states is not None:
        total: Tensor = _called(head)(tiled.taken(), labels)
    else:
        total = _cross_entropy(logits, labels)
    return total / items


def install(model: Any, tiles: int) -> TileLoss:
    """Let a model compute its loss in tiles.

    Args:
        model: the whole model. Call it before what else takes the place of its loss function.
        tiles: of a rank's text.

    Returns:
        The hook to register on the model, last of all, so that it is undone last.

    Raises:
        NotImplementedError: it has no head.
    """
    owner, name = _head_of(model)
    return TileLoss(model, owner, name, tiles)


class TileLoss(Hook):
    """A forward pre-hook of the model: whether this forward has a loss that comes in tiles.

    Args:
        model: the whole model.
        owner, name: the module that has the head, and its name there.
        tiles: see `install`.
    """

    def __init__(self, model: Any, owner: nn.Module, name: str, tiles: int) -> None:
        head: Any = _called(getattr(owner, name))
        self._head, self._forward = head, TiledForward(head, tiles, _softcap(model))
        self._before = vars(head).get("forward")
        head.forward = self._forward
        self._keep = head.register_forward_pre_hook(self._forward.keep, prepend=True)
        self._end = model.register_forward_hook(self._check, with_kwargs=True)
        askable = [model] if owner is model else [model, owner]
        self._losses = [each for each in askable if hasattr(each, "loss_function")]
        self._own = [vars(each).get(_LOSS) for each in self._losses]
        for each in self._losses:
            setattr(each, _LOSS, TiledFunction(head, each.loss_function))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        batch: ShardedBatch | None = kwargs.get(KEYWORD)
        learns = batch is not None and kwargs.get("labels") is not None
        self._forward.begin(learns and torch.is_grad_enabled())

    def _check(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if self._forward.unfinished():
            raise NotImplementedError(
                f"got loss_tiles for a {type(module).__name__}, whose forward makes its loss "
                "without its head, or not by its loss function; remove loss_tiles"
            )

    def undo(self) -> None:
        """Give head and loss functions back."""
        self._keep.remove()
        self._end.remove()
        vars(self._head).pop("forward", None)
        if self._before is not None:
            self._head.forward = self._before
        for module, own in zip(self._losses, self._own, strict=True):
            vars(module).pop(_LOSS, None)
            if own is not None:
                setattr(module, _LOSS, own)


class TiledForward:
    """The forward of a head: logits, or with labels the sum of the cross-entropies.

    Args:
        head: the head.
        tiles: of its states.
        softcap: of logits; None where they are not capped.

    Attributes:
        states: ``[B, s, hidden]``, those that wait for the loss; None where none do.
    """

    def __init__(self, head: Any, tiles: int, softcap: float | None) -> None:
        self._head, self._own, self._tiles, self._softcap = head, head.forward, tiles, softcap
        self._learns = False
        self.states: Tensor | None = None

    def begin(self, learns: bool) -> None:
        """A forward of the model begins, with a loss or without."""
        self._learns, self.states = learns, None

    def unfinished(self) -> bool:
        """Whether no loss has been asked for in a forward that has one; forgets its states."""
        learns = self._learns
        self.begin(False)
        return learns

    def taken(self) -> Tensor:
        """The states that wait, which wait no more."""
        assert self.states is not None
        states = self.states
        self.begin(False)
        return states

    def keep(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before the head runs: of a forward with a loss it sees no token. A pre-hook."""
        if not self._learns or len(args) > 1:
            return None
        self.states = args[0]
        return (args[0][:, :0],)

    def __call__(self, states: Tensor, labels: Tensor | None = None) -> Tensor:
        """``[B, s, V]``, or a scalar where there are labels ``[B, s]``."""
        if labels is None:
            logits: Tensor = self._own(states)
            return logits
        trained = [p for p in self._head.parameters() if p.requires_grad]
        if _inner_is_partitioned(self._head):
            raise NotImplementedError(
                "got loss_tiles with modules inside the head, as adapters are, under ZeRO-3, which "
                "gathers their weights a call; leave the head out of the adapters' targets (peft's "
                "modules_to_save may have it), use ZeRO stage 2, or remove loss_tiles"
            )
        total: Tensor = _Tiles.apply(self._loss_of, self._tiles, labels, states, *trained)
        return total

    def _loss_of(self, states: Tensor, labels: Tensor) -> Tensor:
        logits = self._own(states)
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return _cross_entropy(logits, labels)


class TiledFunction:
    """In place of a loss function of transformers.

    Args:
        head: whose states may wait.
        own: the model's.
    """

    def __init__(self, head: nn.Module, own: Any) -> None:
        self._head, self._own = head, own

    def __call__(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The share of the loss in tiles, where states wait; else the model's own loss."""
        tiled = _tiled(self._head)
        if tiled is None or tiled.states is None:
            return self._own(logits, labels, *args, **kwargs)
        # The labels of an encoder-decoder are those of its own text already.
        wanted = kwargs.get(_SHIFTED)
        return share_of_loss(
            self._head, logits, labels if wanted is None else wanted, kwargs[ITEMS_KEY]
        )


class _Tiles(torch.autograd.Function):
    """The sum of the cross-entropies of states ``[B, s, hidden]``; each tile's logits twice."""

    @staticmethod
    def forward(
        ctx: Any,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        tiles: int,
        labels: Tensor,
        states: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        ctx.loss_of, ctx.trained = loss_of, trained
        ctx.lengths = [each for each in split(states.shape[1], tiles) if each]
        ctx.setting = Setting(states)
        ctx.save_for_backward(states, labels)
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        for part, learnt in _pieces(states, labels, ctx.lengths):
            total += loss_of(part, learnt)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> Any:
        states, labels = ctx.saved_tensors
        of_states = ctx.needs_input_grad[3]
        d_states = torch.empty_like(states) if of_states else None
        # Weights in 16 bits: their gradients add up in fp32.
        totals = [torch.zeros(p.shape, dtype=_widest(p), device=p.device) for p in ctx.trained]
        playback, start = ctx.setting.playback(), 0
        for part, learnt in _pieces(states, labels, ctx.lengths):
            leaf = part.detach().requires_grad_(of_states)
            with torch.enable_grad(), playback.piece():
                loss = ctx.loss_of(leaf, learnt)
            wanted = [*([leaf] if of_states else []), *ctx.trained]
            found = list(torch.autograd.grad(loss, wanted, dloss))
            if d_states is not None:
                d_states[:, start : start + part.shape[1]] = found.pop(0)
            for total, gradient in zip(totals, found, strict=True):
                total += gradient
            start += part.shape[1]
        gradients = [t.to(p.dtype) for t, p in zip(totals, ctx.trained, strict=True)]
        return None, None, None, d_states, *gradients


def _pieces(states: Tensor, labels: Tensor, lengths: list[int]) -> zip[tuple[Tensor, Tensor]]:
    return zip(states.split(lengths, dim=1), labels.split(lengths, dim=1), strict=True)


def _widest(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over all tokens, in fp32."""
    flat = logits.flatten(0, 1).float(), labels.flatten().to(logits.device)
    return nn.functional.cross_entropy(*flat, ignore_index=IGNORED_LABEL, reduction="sum")


def is_tiled(head: Any) -> bool:
    """Whether `install` has been called for this head."""
    return _tiled(head) is not None


def _tiled(head: Any) -> TiledForward | None:
    found = vars(_called(head)).get("forward")
    return found if isinstance(found, TiledForward) else None


def _called(head: Any) -> Any:
    """What has the head's weights: where it trains whole beside LoRA, peft keeps a copy inside of a
    module that hands its calls on."""
    copies = getattr(head, "modules_to_save", None)
    active = getattr(head, "active_adapters", ())
    return copies[active[0]] if isinstance(copies, nn.ModuleDict) and active else head


def _inner_is_partitioned(head: nn.Module) -> bool:
    inner = (p for child in head.children() for p in child.parameters())
    return any(hasattr(parameter, "ds_id") for parameter in inner)


def _head_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that has the head as a child, and the child's name."""
    for module in model.modules():
        ask = getattr(module, "get_output_embeddings", None)
        head = None if ask is None else ask()
        for owner in model.modules() if head is not None else ():
            for name, child in owner.named_children():
                if child is head:
                    return owner, name
    raise NotImplementedError(
        f"got loss_tiles for a {type(model).__name__}, of which get_output_embeddings() gives no "
        "head; remove loss_tiles"
    )


def _softcap(model: Any) -> float | None:
    """What transformers' models do to their logits behind the head."""
    config = getattr(model, "config", None)
    places = (config, *(getattr(config, name, None) for name in ("decoder", "text_config")))
    caps = (getattr(place, "final_logit_softcapping", None) for place in places)
    return next((cap for cap in caps if cap is not None), None)
