"""What the encoder's own forward would do otherwise with a sharded batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ds_lvx.models.cached import causal
from ds_lvx.models.generating.started import ENCODED
from ds_lvx.models.patch import KEYWORD, Hook
from ds_lvx.models.t5gemma2.batch import FULL, PLACES, SLIDING
from ds_lvx.models.visual import PIXELS

FEATURES = "encoder_hidden_states"
RULES = "text_rules"
"""In generation: whom the decoder's text sees of itself, by the type of a layer."""


class Begin(Hook):
    """A forward pre-hook of the model: with the prompt of a generation the encoder runs, too."""

    def __call__(
        self, module: Any, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        begins = kwargs.get(KEYWORD) is not None and PLACES in kwargs
        return (args, {**kwargs, ENCODED: None}) if begins else None


class Embed(Hook):
    """A forward pre-hook of the encoder: embeddings of this rank's text and images.

    A rank without images has a blank one, which goes nowhere. There are no masks: those that
    transformers makes have as many columns as rows.
    """

    def __call__(
        self, module: Any, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        if kwargs.get(KEYWORD) is None:
            return None
        # In generation, too, its rows are cut.
        given = {**kwargs, KEYWORD: replace(kwargs[KEYWORD], decoding=None)}
        embedded = module.text_model.embed_tokens(given.pop("input_ids"))
        pixels, places = given.pop(PIXELS, None), given.pop(PLACES)
        if pixels is not None:
            features = module.get_image_features(pixels, return_dict=True).pooler_output
            embedded = _placed(embedded, features.to(embedded.dtype).flatten(0, 1), places)
        masks = dict.fromkeys((FULL, SLIDING))
        return args, {**given, "inputs_embeds": embedded, "attention_mask": masks}


class Words:
    """Takes the place of a word embedding's ``forward``, which writes the ends of images by a mask:
    the host would wait for how many there are."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, input_ids: Tensor) -> Tensor:
        """``[B, n]`` -> ``[B, n, hidden]``."""
        module = self.module
        embedded = nn.Embedding.forward(module, input_ids)
        embedded = embedded * module.embed_scale.to(module.weight.dtype)
        ends = (input_ids == module.eoi_token_index).unsqueeze(-1)
        return torch.where(ends, module.eoi_embedding.to(embedded.dtype), embedded)


def _placed(embedded: Tensor, features: Tensor, places: Tensor) -> Tensor:
    """Embeddings ``[B, n_r, hidden]`` with features ``[images P, hidden]`` at their places."""
    if len(places) == 0:
        return embedded + features[:0].sum()  # of a blank image: gradients of 0, and not none
    return embedded.flatten(0, 1).index_copy(0, places, features).view_as(embedded)


def masks(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Masks for the decoder, whose forward puts them side by side; nobody reads them."""
    mask = arguments[FEATURES].new_zeros(1, 1, 1, 1)
    every = dict.fromkeys((FULL, SLIDING), mask)
    return {"attention_mask": every, "encoder_attention_mask": every}


def rules(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of the decoder's text in a forward of generation, which every rank has and caches."""
    cache, mask, ids = (
        arguments.get(key) for key in ("past_key_values", "attention_mask", "input_ids")
    )
    assert cache is not None, "generation has a cache"
    assert ids is not None, "generation has tokens"
    past, layers = cache.get_seq_length(), cache.self_attention_cache.layers
    window = next((each.sliding_window for each in layers if each.is_sliding), None)
    kinds = {FULL: None, SLIDING: window}
    return {RULES: {kind: causal(mask, ids, past=past, window=w) for kind, w in kinds.items()}}
