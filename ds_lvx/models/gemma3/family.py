"""Gemma 3: which modules attend, what its units are, and how its tower runs.

Five layers in six see a window of the text; the tokens of an image see each other in both
directions, in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, Gemma3ForConditionalGeneration
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
from transformers.models.siglip.modeling_siglip import SiglipAttention

from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.concatenated.batch import Arrange, Sequences, Unit
from ds_lvx.models.concatenated.family import SLIDING, Concatenated
from ds_lvx.models.concatenated.forward import Encoded
from ds_lvx.models.gemma3 import batch as batches
from ds_lvx.models.gemma3 import dimensions, sized
from ds_lvx.models.gemma3 import processor as processors
from ds_lvx.models.layers import LayerPlan
from ds_lvx.models.patch import KEYWORD, Hook
from ds_lvx.models.text import Text
from ds_lvx.models.visual import PIXELS


class _Unmasked(Hook):
    """A forward pre-hook of the inner model, which builds masks of ``[s, s]`` itself, before the
    text model runs: none where nobody reads them."""

    def __call__(
        self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        batch: ShardedBatch | None = kwargs.get(KEYWORD)
        if batch is None:
            return None
        return args, {**kwargs, "attention_mask": torch.zeros(1, 1, 1, 1, device=batch.text.device)}


class Gemma3(Concatenated):
    """See `ds_lvx.models.contract.Family` and `Concatenated` for what each part does."""

    keys = (PIXELS, batches.TYPES)
    patterns: Mapping[str, str] = {"local": "*vision_tower*", "self": "*language_model*.self_attn"}
    of_text = Gemma3Attention
    within = SiglipAttention
    sources = (PIXELS,)
    takes = (PIXELS,)
    sized = sized
    of_class = Gemma3ForConditionalGeneration
    layer_types = ("full_attention", SLIDING)

    # ---- patching

    def check(self, model: Any, *, sp_size: int) -> None:
        super().check(model, sp_size=sp_size)
        batches.image_tokens(model.config)
        if model.config.text_config.use_bidirectional_attention:
            raise NotImplementedError(
                "got a text model with use_bidirectional_attention; expected one that sees the "
                "text before a token, and generates: set it to false in text_config"
            )

    @staticmethod
    def encode(module: Any, given: Mapping[str, Any]) -> Encoded:
        made = module.get_image_features(given[PIXELS], return_dict=True)
        return Encoded(made.pooler_output.flatten(0, 1))

    def install(self, model: Any, plans: Sequence[LayerPlan]) -> None:
        super().install(model, plans)
        self.inner(model).register_forward_pre_hook(_Unmasked(), with_kwargs=True)

    # ---- batches

    def units(self, batch: Mapping[str, Any], ids: Tensor, config: Any) -> list[Unit]:
        return batches.units(ids, config)

    def visual_tokens(self, ids: Tensor, config: Any) -> Tensor:
        return ids == config.image_token_id

    def text(self, batch: Mapping[str, Any], model: Any) -> Text:
        made, of_text = super().text(batch, model), model.config.text_config
        assert isinstance(made, Sequences)
        window = of_text.sliding_window if SLIDING in of_text.layer_types else None
        return replace(made, ends=batches.ends(batch, made.input_ids), window=window)

    def pixels(self, batch: Mapping[str, Any], config: Any) -> dict[str, Tensor]:
        given = super().pixels(batch, config)
        for pixels in given.values():
            batches.check_pixels(pixels, config)
        return given

    def arrange(self, config: Any) -> Arrange:
        return batches.arrange

    def blank(self, model: Any) -> dict[str, Tensor]:
        return batches.blank(model.config)

    # ---- data

    def load_processor(self, name: str) -> processors.Processor:
        return processors.Processor.of(name, AutoConfig.from_pretrained(name))

    inputs = staticmethod(processors.inputs)

    # ---- models

    dimensions = staticmethod(dimensions.dimensions)
    build = staticmethod(sized.build)

    def vision_tower(self, model: Any) -> Any:
        return model.model.vision_tower

    frame_tokens = staticmethod(batches.image_tokens)
