"""Where mllama's visual features lie while the text model runs.

transformers' forward holds on to the vision tower's output (7,680 numbers a token) to its end,
and to the projected features (4,096) that the cross-attention layers share. With a sharded batch
the first is let go as soon as it is projected, and the second may wait on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration

from ds_lvx.attention.features import offload
from ds_lvx.models.patch import KEYWORD, Hook


class _Pass:
    """What the hooks below know of the forward that is running."""

    def __init__(self) -> None:
        self.sharded = False
        self.encoded: Any = None


class _Begin(Hook):
    def __init__(self, state: _Pass) -> None:
        self._state = state

    def __call__(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._state.sharded = kwargs.get(KEYWORD) is not None
        self._state.encoded = None


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
        if encoded is not None:
            encoded["last_hidden_state"] = None
        return offload(output) if self._offloads else None


def install(model: MllamaForConditionalGeneration, *, offloads: bool) -> None:
    """Put the hooks on a model.

    Args:
        model: the model.
        offloads: a layer wants its features on the host, and so all of them share those.
    """
    state = _Pass()
    model.model.register_forward_pre_hook(_Begin(state), with_kwargs=True)
    model.model.vision_model.register_forward_hook(_Encoded(state))
    model.model.multi_modal_projector.register_forward_hook(
        _Projected(state, offloads=offloads),
    )
