"""In place of the forwards of Qwen-VL and of its text model, whose signatures know no keyword of
ours.

By themselves they open image files, build a mask of ``[T, T]``, and take a mean of the losses at
hand. With a sharded batch the pixels come with it, the layers run one after the other as in the
model's own forward, and the loss counts the labels of the whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ds_lvx.models.adapters.batch import LENGTHS, ROWS
from ds_lvx.models.adapters.forward import gather_images
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.cached import Cached, causal
from ds_lvx.models.checkpointed_layers import run_layer
from ds_lvx.models.patch import KEYWORD, KeepForward
from ds_lvx.models.qwen_vl.attention import ROTARY, Carried
from ds_lvx.models.qwen_vl.batch import PLACES
from ds_lvx.models.text import ITEMS_KEY
from ds_lvx.models.tiled_loss import share_of_loss
from ds_lvx.models.visual import PIXELS

_CACHE, _MASK = "past_key_values", "attention_mask"
_OF_TEXT = ("input_ids", "use_cache", _CACHE, _MASK, PIXELS, ROWS, LENGTHS, PLACES)


class Forward:
    """The forward of the model: logits and loss of this rank's shard."""

    def __init__(self, model: Any) -> None:
        self._model, self._own = model, model.forward
        self.__signature__ = inspect.signature(self._own)  # which transformers' generate looks at

    def __call__(self, *args: Any, ds_lvx: ShardedBatch | None = None, **kwargs: Any) -> Any:
        """Without a sharded batch the model's own."""
        if ds_lvx is None:
            return self._own(*args, **kwargs)
        for key in ("output_hidden_states", "output_attentions"):
            if kwargs.get(key):
                raise NotImplementedError(
                    f"got {key}=True with a sharded batch of Qwen-VL; its layers' states and "
                    "weights are not collected: leave it out"
                )
        given = {key: kwargs[key] for key in _OF_TEXT if key in kwargs}
        states, cache = self._model.transformer(**given, **{KEYWORD: ds_lvx}), None
        if ds_lvx.decoding is not None:
            states, cache = states[:, -1:], kwargs[_CACHE]
        logits, loss = self._model.lm_head(states), None
        if kwargs.get("labels") is not None:
            loss = share_of_loss(
                self._model.lm_head, logits, kwargs["shift_labels"], kwargs[ITEMS_KEY]
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)


class TextForward:
    """The forward of the text model: the last states of this rank's text, ``[B, s, hidden]``."""

    def __init__(self, text: Any) -> None:
        self._text, self._own = text, text.forward

    def __call__(self, *args: Any, ds_lvx: ShardedBatch | None = None, **kwargs: Any) -> Any:
        """Without a sharded batch the model's own."""
        if ds_lvx is None:
            return self._own(*args, **kwargs)
        text = self._text
        x, cached = text.drop(text.wte(kwargs["input_ids"])), None
        if kwargs.get(PIXELS) is not None:
            copies = 1 if ds_lvx.decoding is None else ds_lvx.decoding.copies
            # Rows of a sample lie side by side, and begin with the same.
            x = self._with_images(x[::copies], ds_lvx, kwargs)
            x = x if copies == 1 else x.repeat_interleave(copies, dim=0)
        if ds_lvx.decoding is not None:
            cache = kwargs[_CACHE]
            cached = Cached(cache, 0, causal(kwargs.get(_MASK), x, past=cache.get_seq_length()))
        carried = Carried.of(ds_lvx, text, x, cached=cached)
        for number, block in enumerate(text.h):
            run = partial(block, **{ROTARY: carried.layer(number)}, use_cache=False)
            out = run_layer(run, block, text, args=(x,))
            # DeepSpeed's checkpoint returns a tuple of one tensor as that tensor.
            x = out if isinstance(out, Tensor) else out[0]
        return text.ln_f(x)

    def _with_images(self, x: Tensor, batch: ShardedBatch, kwargs: Mapping[str, Any]) -> Tensor:
        """The text with what the resampler makes of images in their places."""
        made = self._text.visual(kwargs[PIXELS])
        rows = gather_images(made, kwargs[ROWS], channel=batch.channel, lengths=kwargs[LENGTHS])
        return torch.masked_scatter(x, kwargs[PLACES].unsqueeze(-1), rows.to(x.dtype))


def install(model: Any) -> None:
    """Put both on a model."""
    text = model.transformer
    model.register_forward_pre_hook(KeepForward(model, Forward(model)))
    text.register_forward_pre_hook(KeepForward(text, TextForward(text)))
