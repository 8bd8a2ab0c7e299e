"""In place of the forward of mPLUG-Owl3's text model, whose signature takes no keyword of ours.

With a sharded batch the layers run one after the other as in the model's own forward: positions
come with the batch, features go to their places, and the loss counts the labels of the whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.cached import causal
from ds_lvx.models.checkpointed_layers import run_layer
from ds_lvx.models.mplugowl3.attention import Rotary, mask_of, rotary
from ds_lvx.models.mplugowl3.batch import PLACES, POSITIONS
from ds_lvx.models.mplugowl3.cached import Cached
from ds_lvx.models.patch import KEYWORD, Hook
from ds_lvx.models.text import ITEMS_KEY
from ds_lvx.models.tiled_loss import share_of_loss

FEATURES = "image_embeds"
_SHIFTED = "shift_labels"
_ENCODE = "forward_image"


class Pack(Hook):
    """A forward pre-hook of the text model: features ``[B, s_kv, hidden]``, each in its place.

    It owns the forward in its place as well, and gives that back.
    """

    def __init__(self, text: Any) -> None:
        self._text, self._before = text, vars(text).get("forward")
        text.forward = TextForward(text)

    def __call__(
        self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        batch, x = kwargs.get(KEYWORD), kwargs.get(FEATURES)
        if batch is None or x is None:
            return None
        places = kwargs[PLACES]
        if batch.cross is None or len(places) == 0:
            return None  # a blank image, which is dropped
        tokens, hidden = x.shape[1:]
        length = batch.cross.kv_lengths[batch.channel.rank]
        samples = kwargs[POSITIONS].shape[0]
        features = x.new_zeros(samples * length // tokens, tokens, hidden)
        features = features.index_copy(0, places, x)
        return args, {**kwargs, FEATURES: features.view(samples, length, hidden)}

    def undo(self) -> None:
        """Give the text model its forward back."""
        del self._text.__dict__["forward"]
        if self._before is not None:
            self._text.forward = self._before


class EncodeOnce(Hook):
    """A forward pre-hook of the model: its tower runs once a forward with a sharded batch.

    By itself it runs over ``vision_batch_size`` images at a time: not equally often on all ranks,
    which under ZeRO-3 would wait for each other. It keeps the states of all its layers until it is
    done, of which the last but one is used. And in release 240728 it never trains.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._before = model, vars(model).get(_ENCODE)
        self._own = getattr(model, _ENCODE)
        self._sharded = False
        setattr(model, _ENCODE, self._encode)

    def __call__(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._sharded = kwargs.get(KEYWORD) is not None

    def _encode(self, pixels: Tensor | None) -> Any:
        if not self._sharded or pixels is None:
            return self._own(pixels)
        return self.encoded(pixels)

    def encoded(self, pixels: Tensor) -> Any:
        """Images to features ``[images, P, hidden]``."""
        model = self._model
        dtype = model.language_model.model.embed_tokens.weight.dtype
        states = _states(model.vision_model, pixels.to(dtype))
        to_text = model.vision2text_model
        return states if to_text is None else to_text(states)

    def undo(self) -> None:
        """Give the model its own way back."""
        vars(self._model).pop(_ENCODE, None)
        if self._before is not None:
            setattr(self._model, _ENCODE, self._before)


def _states(tower: Any, pixels: Tensor) -> Tensor:
    """What the last layer of the tower but one makes of images, ``[images, P, hidden]``."""
    if any(parameter.requires_grad for parameter in tower.parameters()):
        return cast(Tensor, tower(pixels, output_hidden_states=True).hidden_states[-2])
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    last = tower.encoder.layers[-1].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            tower(pixels)
    finally:
        last.remove()
    return found[0]


class TextForward:
    """The forward of a causal language model with ``model`` and ``lm_head``."""

    def __init__(self, text: Any) -> None:
        self._text, self._own = text, text.forward
        self.__signature__ = inspect.signature(self._own)  # which transformers' generate looks at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Logits and loss of this rank's shard; without a sharded batch the model's own."""
        batch = kwargs.get(KEYWORD)
        if batch is None:
            return self._own(*args, **kwargs)
        for key in ("output_hidden_states", "output_attentions"):
            if kwargs.get(key):
                raise NotImplementedError(
                    f"got {key}=True with a sharded batch of mPLUG-Owl3; its layers' states and "
                    "weights are not collected: leave it out"
                )
        hidden, cache = self._hidden(batch, kwargs), None
        if batch.decoding is not None:
            hidden, cache = hidden[:, -1:], kwargs["past_key_values"]
        logits = self._text.lm_head(hidden).float()
        loss = None
        if kwargs.get("labels") is not None:
            loss = share_of_loss(self._text.lm_head, logits, kwargs[_SHIFTED], kwargs[ITEMS_KEY])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _hidden(self, batch: ShardedBatch, kwargs: Mapping[str, Any]) -> Tensor:
        inside, cache = self._text.model, kwargs.get("past_key_values")
        x, rule = inside.embed_tokens(kwargs["input_ids"]), None
        if not batch.shards("self"):
            assert cache is not None, "generation has a cache"
            rule = causal(kwargs.get("attention_mask"), x, past=cache.get_seq_length())
        cos, sin = self._rotary(kwargs["position_ids"])
        of_text = cos.to(x.dtype), sin.to(x.dtype)
        of_images = self._rotary_of_images(batch, kwargs)
        for number, layer in enumerate(inside.layers):
            cached = None
            if batch.decoding is not None:
                cached = Cached(cache, number, rule, layer.input_layernorm)
            run = partial(
                layer,
                attention_mask=mask_of(batch, x, text=of_text, images=of_images, cached=cached),
                position_ids=None,
                image_embeds=kwargs.get(FEATURES),
                media_offset=None,
                use_cache=False,
            )
            out = run_layer(run, layer, inside, args=(x,))
            # DeepSpeed's checkpoint returns a tuple of one tensor as that tensor.
            x = out if isinstance(out, Tensor) else out[0]
        normed: Tensor = inside.norm(x)
        return normed

    def _rotary(self, positions: Tensor) -> Rotary:
        config = self._text.config
        head_dim = config.hidden_size // config.num_attention_heads
        return rotary(positions, head_dim=head_dim, theta=_theta(config))

    def _rotary_of_images(self, batch: ShardedBatch, kwargs: Mapping[str, Any]) -> Rotary | None:
        """Of this rank's visual tokens; None where there are none to be projected."""
        positions, features = kwargs.get(POSITIONS), kwargs.get(FEATURES)
        if positions is None or features is None:
            return None
        tokens = features.shape[1]
        if batch.decoding is not None:  # which keeps the features
            tokens = 0 if batch.kv_lengths is None else batch.kv_lengths[batch.channel.rank]
        each = tokens // max(positions.shape[1], 1)
        return self._rotary(positions.repeat_interleave(each, dim=1))


def _theta(config: Any) -> float:
    theta = getattr(config, "rope_theta", None)
    return float(config.rope_parameters["rope_theta"] if theta is None else theta)
