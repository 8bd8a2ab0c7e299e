"""Where mllama's visual features lie while the text model runs.

transformers' forward holds on to the vision tower's output (7,680 numbers a token) to its end,
and to the projected features (4,096) that the cross-attention layers share. With a sharded batch
the first is let go as soon as it is projected, and the second may wait on the host.

The vision tower runs in every group of ranks that trains beside others: ZeRO-3 gathers its weights
from all of them, and ZeRO-1 and -2 reduce what gradients there are, in buckets that must be alike.
A group whose batch has features already sends a blank image through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration

from ds_lvx.attention.checkpointing import is_partitioned
from ds_lvx.attention.features import offload
from ds_lvx.models.batch import ShardedBatch, move
from ds_lvx.models.mllama.batch import STATES, blank
from ds_lvx.models.patch import KEYWORD, Hook


class _Pass:
    """What the hooks below know of the forward that is running."""

    def __init__(self) -> None:
        self.sharded = False
        self.encoded: Any = None
        self.projected = False  # the features are of images


class _Begin(Hook):
    def __init__(self, state: _Pass) -> None:
        self._state = state

    def __call__(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._state.sharded = kwargs.get(KEYWORD) is not None
        self._state.encoded, self._state.projected = None, False


class _BesideOthers(Hook):
    """A forward pre-hook of the text model, the first: where the tower has run in other groups.

    Args:
        state: of the forward.
        model: the model without its head.
    """

    def __init__(self, state: _Pass, model: Any) -> None:
        self._state, self._model = state, model

    def __call__(
        self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        batch: ShardedBatch | None = kwargs.get(KEYWORD)
        states = kwargs.get(STATES)
        if batch is None or batch.world is None or states is None or self._state.projected:
            return None
        if not is_partitioned(self._model) and not _reduces(self._model):
            return None
        self._state.sharded = False
        others = _blank_encoded(self._model, batch.text.device)
        self._state.sharded = True
        return args, {**kwargs, STATES: _Beside.apply(states, others)}


class _Encoded(Hook):
    def __init__(self, state: _Pass) -> None:
        self._state = state

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._state.sharded:
            self._state.encoded = output


class _Projected(Hook):
    def __init__(self, state: _Pass, *, offloads: bool) -> None:
        self._state = state
        self._offloads = offloads

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not self._state.sharded:
            return None
        encoded, self._state.encoded = self._state.encoded, None
        self._state.projected = True
        if encoded is not None:
            encoded["last_hidden_state"] = None
        return offload(output) if self._offloads else None


def _reduces(module: Any) -> bool:
    """Whether ZeRO-1 or -2 will reduce gradients of the vision tower or the projector."""
    if not torch.is_grad_enabled():
        return False
    parts = module.vision_model, module.multi_modal_projector
    trained = (p for part in parts for p in part.parameters() if p.requires_grad)
    return any(hasattr(p, "_hp_mapping") for p in trained)


class _Beside(torch.autograd.Function):
    """Features that are given, as if they came with others, whose gradients are 0."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, others: Tensor) -> Tensor:
        ctx.save_for_backward(others)
        return given.view_as(given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (others,) = ctx.saved_tensors
        return grads[0], torch.zeros_like(others)


def _blank_encoded(module: Any, device: torch.device) -> Tensor:
    """A blank image through tower and projector: features that nobody is to see."""
    pixels = {key: move(each, device) for key, each in blank(module).items()}
    features: Tensor = module.multi_modal_projector(module.vision_model(**pixels).last_hidden_state)
    return features


def install(model: MllamaForConditionalGeneration, *, offloads: bool) -> None:
    """Put the hooks on a model.

    Args:
        model: the model.
        offloads: a layer wants its features on the host, and so all of them share those.
    """
    state = _Pass()
    model.model.register_forward_pre_hook(_Begin(state), with_kwargs=True)
    model.model.language_model.register_forward_pre_hook(
        _BesideOthers(state, model.model), with_kwargs=True, prepend=True
    )
    model.model.vision_model.register_forward_hook(_Encoded(state))
    model.model.multi_modal_projector.register_forward_hook(
        _Projected(state, offloads=offloads),
    )
