"""What the model's own forward would do otherwise with a sharded batch.

Encoder, perceiver and text are one module there, which makes a mask of text by visual tokens. With
a sharded batch the images are encoded before it begins, and it is handed their features, and a mask
of one column: whether a token sees an image at all, which is all that its gate asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ds_lvx.attention.features import offload
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.patch import KEYWORD, Hook

FEATURES = "perceiver_embeddings"
_UNSAMPLED = "image_encoder_embeddings"
_PIXELS = "pixel_values"
_LOSS = "_loss_function"


class Encode(Hook):
    """A forward pre-hook of `IdeficsModel`: this rank's pixels to its features.

    Args:
        offloads: the features are to wait on the host.
    """

    def __init__(self, *, offloads: bool) -> None:
        self._offloads = offloads

    def __call__(
        self, module: Any, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        pixels: Tensor | None = kwargs.get(_PIXELS)
        if kwargs.get(KEYWORD) is None or pixels is None:
            return None
        images = pixels.to(module.dtype).flatten(0, 1)
        states = module.vision_model(pixel_values=images).last_hidden_state
        if module.config.use_resampler:
            states = module.perceiver_resampler(states)
        features = states.reshape(len(pixels), -1, states.shape[-1])
        kept = offload(features) if self._offloads else features
        return args, {**kwargs, _PIXELS: None, FEATURES: kept}


class Hand(Hook):
    """A forward pre-hook of `IdeficsModel`, the last: arguments as its forward takes them."""

    def __call__(
        self, module: Any, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        batch: ShardedBatch | None = kwargs.get(KEYWORD)
        if batch is None:
            return None
        features = kwargs[FEATURES]
        assert features is not None, "a batch without images has a blank one"
        assert batch.row_mask is not None, "every batch says who sees an image"
        given = {
            # An image of one visual token each, so that a mask of one column fits any number.
            FEATURES if module.config.use_resampler else _UNSAMPLED: features.unsqueeze(2),
            "image_attention_mask": batch.row_mask[:, 0],
        }
        if batch.shards("self"):
            # Four dimensions stop transformers from building a mask of [s, s]; nobody reads it.
            given["attention_mask"] = kwargs["input_ids"].new_zeros(1, 1, 1, 1)
            given["use_cache"] = batch.decoding is not None
        return args, {**kwargs, FEATURES: None, **given}


class Loss:
    """In place of the model's loss function, which knows nothing of additional vocabulary."""

    def __init__(self, model: Any) -> None:
        self._own = model.loss_function

    def __call__(self, *, ds_lvx: ShardedBatch | None = None, **kwargs: Any) -> Any:
        """The model's loss; of a sharded batch over all columns of the logits."""
        if ds_lvx is not None:
            kwargs["vocab_size"] = kwargs["logits"].shape[-1]
        return self._own(**kwargs)


class KeepLoss(Hook):
    """A forward pre-hook of the model that only knows which loss function to put back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = vars(model).get(_LOSS)
        setattr(model, _LOSS, Loss(model))

    def __call__(self, module: nn.Module, args: Any) -> None:
        return None

    def undo(self) -> None:
        """Give the model its loss function back."""
        vars(self._model).pop(_LOSS, None)
        if self._before is not None:
            setattr(self._model, _LOSS, self._before)


def install(model: Any, *, offloads: bool) -> None:
    """Put all of it on a model.

    Args:
        model: the whole model.
        offloads: the features are to wait on the host.

    Raises:
        NotImplementedError: they are, but the model's forward would take them back to the device.
    """
    if offloads and not model.config.use_resampler:
        raise NotImplementedError(
            'ds_lvx.layers: got features "offload" for an idefics without a perceiver resampler, '
            "whose own forward moves the features to the device; remove it from the rule"
        )
    inside = model.model
    # Before the hook that checks the features and shares them, and after it.
    inside.register_forward_pre_hook(Encode(offloads=offloads), with_kwargs=True, prepend=True)
    inside.register_forward_pre_hook(Hand(), with_kwargs=True)
    model.register_forward_pre_hook(KeepLoss(model))
