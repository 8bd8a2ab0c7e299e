"""What the model's own forward would do otherwise with a sharded batch.

It encodes the images and leaves features and the places of image tokens on every layer of the text,
then runs the language model on text alone. With a sharded batch the language model is handed the
features and the batch, and its layers get them from there. Generation is the language model's own,
which is handed the pixels instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ds_lvx.attention.features import offload
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.inputs import EncodePixels
from ds_lvx.models.openflamingo.attention import places
from ds_lvx.models.openflamingo.batch import PIXELS
from ds_lvx.models.openflamingo.mpt import BIAS, carrying
from ds_lvx.models.patch import KEYWORD, Hook, KeepForward
from ds_lvx.models.precision import dtype_of

FEATURES = "ds_lvx_media"


class _Pass:
    """The sharded batch of the forward that is running, for layers that are handed no keywords."""

    batch: ShardedBatch | None = None


class Forward:
    """In place of the model's forward, which knows no keyword of ours.

    Args:
        model: a `Flamingo`.
        state: what its hooks know.
        offloads: the features are to wait on the host.
    """

    def __init__(self, model: Any, state: _Pass, *, offloads: bool) -> None:
        self._model, self._state, self._offloads = model, state, offloads
        self._own = vars(model).get("forward")

    def __call__(self, *args: Any, ds_lvx: ShardedBatch | None = None, **kwargs: Any) -> Any:
        """The language model's output."""
        if ds_lvx is not None:
            return self._sharded(ds_lvx, **kwargs)
        own = partial(type(self._model).forward, self._model) if self._own is None else self._own
        return own(*args, **kwargs)

    def _sharded(self, batch: ShardedBatch, *, vision_x: Tensor, **text: Any) -> Any:
        given = {KEYWORD: batch, FEATURES: self.encoded(vision_x)}
        with _cleared(self._model.lang_encoder, self._state) as lang_encoder:
            return lang_encoder(**text, **given)

    def encoded(self, pixels: Tensor) -> Tensor:
        """``vision_x [B, n, 1, ...]`` to features ``[B, n * latents, width]``, where they wait."""
        tower = self._model.vision_encoder
        with torch.no_grad():  # as the model's own forward has it
            tokens = tower(pixels.to(dtype_of(tower)).flatten(0, 2))[1]
        states: Tensor = self._model.perceiver(tokens.unflatten(0, pixels.shape[:3]))
        features = states.flatten(1, 2)
        return offload(features) if self._offloads else features


@contextmanager
def _cleared(lang_encoder: Any, state: _Pass) -> Iterator[Any]:
    """Nothing holds on to anything of a batch afterwards."""
    try:
        yield lang_encoder
    finally:
        state.batch = None
        lang_encoder.clear_conditioned_layers()


class Clear(Hook):
    """A forward hook of the language model: layers hold on to nothing of a generation."""

    def __init__(self, state: _Pass) -> None:
        self._state = state

    def __call__(self, module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        batch = kwargs.get(KEYWORD)
        if batch is not None and batch.decoding is not None:
            self._state.batch = None
            module.clear_conditioned_layers()


class Hand(Hook):
    """A forward pre-hook of the language model, the last: its layers get the features."""

    def __init__(self, state: _Pass) -> None:
        self._state = state

    def __call__(
        self, module: Any, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        self._state.batch = kwargs.get(KEYWORD)
        if self._state.batch is None:
            return None
        for layer in module._get_decoder_layers():
            layer.condition_vis_x(kwargs[FEATURES])
        return args, {key: value for key, value in kwargs.items() if key != FEATURES}


class Condition(Hook):
    """A forward pre-hook of a layer: the batch, where the language model left its image tokens, and
    where its bias goes to an attention that is handed no keyword."""

    def __init__(self, state: _Pass) -> None:
        self._state = state

    def __call__(
        self, module: Any, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        batch = self._state.batch
        if batch is None:
            return None
        module.condition_media_locations(places(batch))
        if hasattr(module, "condition_use_cached_media"):  # the package's own
            module.condition_use_cached_media(False)
        if BIAS not in kwargs:
            return None
        return args, {**kwargs, BIAS: carrying(kwargs[BIAS], batch)}


class Gated:
    """The gated layers as an encoder whose checkpointing is the language model's.

    Attributes:
        layers: the gated layers.
    """

    def __init__(self, inside: nn.Module, layers: Sequence[nn.Module]) -> None:
        self._inside: Any = inside
        self.layers = layers

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the layers are checkpointed."""
        return bool(self._inside.gradient_checkpointing)

    @property
    def _gradient_checkpointing_func(self) -> Any:
        return self._inside._gradient_checkpointing_func


def install(model: Any, *, offloads: bool) -> None:
    """Put all of it on a model.

    Args:
        model: the whole model.
        offloads: the features are to wait on the host.
    """
    state = _Pass()
    forward = Forward(model, state, offloads=offloads)
    model.register_forward_pre_hook(KeepForward(model, forward))
    text = model.lang_encoder
    # Before the hook that checks the features and shares them, and after it.
    encode = EncodePixels(forward.encoded, PIXELS, FEATURES)
    text.register_forward_pre_hook(encode, with_kwargs=True, prepend=True)
    text.register_forward_pre_hook(Hand(state), with_kwargs=True)
    text.register_forward_hook(Clear(state), with_kwargs=True)
    for layer in text._get_decoder_layers():
        layer.register_forward_pre_hook(Condition(state), with_kwargs=True)
