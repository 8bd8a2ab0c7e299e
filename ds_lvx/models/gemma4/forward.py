"""Gemma 4's tower, and what its inner forward would do otherwise with a rank's part of a batch.

As the model's own, without what waits for the device or reads weights that ZeRO-3 has partitioned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4ModelOutputWithPast
from transformers.utils.generic import is_flash_attention_requested

from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.concatenated.forward import Embed
from ds_lvx.models.gemma4.batch import MASK, PLACES, TAKEN, special
from ds_lvx.models.patch import KEYWORD
from ds_lvx.models.visual import PIXELS

_OF_LAYERS = "per_layer_inputs"
_OURS = (*("input_ids", "attention_mask", "logits_to_keep"), "mm_token_type_ids", "labels")


def encoded(module: Any, given: Mapping[str, Any]) -> Tensor:
    """Features of images and frames, ``[tokens, hidden]``.

    Args:
        module: the inner model.
        given: what `ds_lvx.models.gemma4.batch.arrange` made.
    """
    tower, pixels, places = module.vision_tower, given[PIXELS], given[PLACES[PIXELS]]
    padding, mask = (places < 0).all(dim=-1), given.get(MASK)
    embedded = tower.patch_embedder(pixels, places, padding)
    if mask is not None:
        # A tensor of four dimensions is taken as it is; FlashAttention finds lengths in one of two.
        flash = is_flash_attention_requested(tower.config)
        mask = ~padding if flash else mask.clamp(min=torch.finfo(embedded.dtype).min)
        mask = mask if flash else mask.to(embedded.dtype)
    states = tower.encoder(
        inputs_embeds=embedded, attention_mask=mask, pixel_position_ids=places
    ).last_hidden_state
    pooled, _ = tower.pooler(
        hidden_states=states,
        pixel_position_ids=places,
        padding_positions=padding,
        output_length=places.shape[1] // tower.config.pooling_kernel_size**2,
    )
    taken, tokens = given.get(TAKEN), pooled.flatten(0, 1)
    tokens = tokens if taken is None else tokens.index_select(0, taken)
    if tower.config.standardize:
        tokens = (tokens - tower.std_bias.float()) * tower.std_scale.float()
    features: Tensor = module.embed_vision(inputs_embeds=tokens.to(embedded.dtype))
    return features


class EmbedForLayers(Embed):
    """`Embed` that makes what each layer adds to a token as well, where a model has it.

    Tokens that stand for images are padding's there, as in the model's own code.
    """

    def __call__(
        self, module: Any, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        if kwargs.get(KEYWORD) is None:
            return None
        text, ids = module.config.text_config, kwargs["input_ids"]
        ids = ids.masked_fill(special(ids, module.config), text.pad_token_id)
        made = super().__call__(module, args, {**kwargs, "input_ids": ids})
        assert made is not None
        if text.hidden_size_per_layer_input:
            made[1][_OF_LAYERS] = module.language_model.get_per_layer_inputs(ids, None)
        return made


class Forward:
    """The forward of a `Gemma4Model` that takes embeddings of a sharded batch, too.

    Its own would look for images in them, and build masks of ``[s, s]``.

    Args:
        module: the inner model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        self._own = vars(module).get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The text model's output; without a sharded batch what the model itself returns."""
        batch: ShardedBatch | None = kwargs.get(KEYWORD)
        if batch is None and self._own is not None:
            return self._own(*args, **kwargs)
        if batch is None:
            return type(self._module).forward(self._module, *args, **kwargs)
        given = {key: each for key, each in kwargs.items() if key not in _OURS}
        made = self._module.language_model(**{**given, "return_dict": True})
        return Gemma4ModelOutputWithPast(**made)
