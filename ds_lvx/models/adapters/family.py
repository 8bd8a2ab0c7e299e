"""What families share whose adapter makes a few tokens of an image, among the text's own.

Images are dealt out over the ranks. Encoder and adapter run as they are on a rank's own images, and
attend within an image. The rows that they make, few of them, are gathered where the text has their
places; the text is split by token, and attends to itself over all ranks. No visual key travels but
among the text's. A language model with an encoder runs whole on every rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ds_lvx.models.adapters.batch import Images, images_of, places_of
from ds_lvx.models.adapters.whole_text import ShareLoss, WholeText
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.contract import Family
from ds_lvx.models.dispatch import Dispatched
from ds_lvx.models.layers import Layer, LayerPlan
from ds_lvx.models.patch import PatchedAttention, refuse_growing_rope
from ds_lvx.models.text import Text
from ds_lvx.models.tiled_loss import is_tiled
from ds_lvx.models.visual import Visual

_MASKED_POSITIONS = ("opt",)
"""Language models whose positions leave out padding, by ``model_type``; others count places."""


class Adapter(Family):
    """Base of these families; a family says what its images are, and installs its encoder's hook.

    Attributes:
        within: classes of attention within an image, of encoder and adapter.
    """

    features_key = ""
    zigzag = True
    patterns: Mapping[str, str] = {
        "local": "*vision_model*",
        "self": "*language_model*.self_attn",
    }
    lora_targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|out_proj)"
    within: tuple[type[nn.Module], ...] = ()

    @abstractmethod
    def image_token(self, config: Any) -> int | None:
        """The id of the token that stands in an image's places; None: there is none."""

    @abstractmethod
    def image_places(self, config: Any) -> int:
        """Places of an image in the text: rows that the adapter makes of it."""

    @abstractmethod
    def at_hand(
        self, batch: Mapping[str, Any], counts: Tensor, config: Any
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The images of a batch.

        Args:
            batch: what the caller gave; entries that are None are left out.
            counts: int64 ``[B]``, images of each sample by the places in its text.
            config: of the model.

        Returns:
            What the model's encoder takes of them, each with a row an image, all samples' one after
            the other; and how many of each sample they are, int64 ``[B]``.

        Raises:
            ValueError: entries that contradict each other or the model.
        """

    # ---- patching

    def attention_layers(self, model: Any) -> list[Layer]:
        inside = self.text_model(model)
        split = not cast(Any, inside).config.is_encoder_decoder
        text = {id(module) for module in inside.modules()} if split else set()
        layers = []
        for name, module in model.named_modules():
            if isinstance(module, self.within):
                layers.append(layer_of(name, module, of_text=False))
            elif id(module) in text and is_causal(module):
                layers.append(layer_of(name, module, of_text=True))
        return layers

    def forward(self, layer: Layer, plan: LayerPlan) -> PatchedAttention:
        return Dispatched(layer.module, plan)

    def text_model(self, model: Any) -> nn.Module:
        found: nn.Module = model.language_model
        return found

    def check(self, model: Any, *, sp_size: int) -> None:
        config: Any = self.text_model(model).config
        if getattr(config, "layerdrop", 0.0) > 0:
            raise NotImplementedError(
                f"got layerdrop {config.layerdrop}, by which each rank would skip layers of its "
                "own choice; set it to 0 in the config of the text model"
            )
        rope = getattr(config, "rope_parameters", None) or {}
        refuse_growing_rope(rope.get("rope_type", "default"), sp_size)

    def prepare(self, batch: ShardedBatch, arguments: Mapping[str, Any]) -> dict[str, Any]:
        if "decoder_input_ids" in arguments:
            return {}  # an encoder-decoder, which runs whole
        # Four dimensions stop transformers from building a mask of [s, s]; nobody reads it.
        return {"attention_mask": torch.zeros(1, 1, 1, 1, device=batch.text.device)}

    def install(self, model: Any, plans: Sequence[LayerPlan]) -> None:
        config: Any = self.text_model(model).config
        if config.is_encoder_decoder:
            if is_tiled(model.language_model.get_output_embeddings()):
                raise NotImplementedError(
                    "got loss_tiles for a text model that runs whole on every rank and makes its "
                    "loss of all logits; remove loss_tiles"
                )
            model.register_forward_hook(ShareLoss(), with_kwargs=True)

    def generator(self, model: Any) -> Any:
        text: Any = self.text_model(model)
        if text.config.is_encoder_decoder:
            raise NotImplementedError(
                f"got a text model with an encoder, {text.config.model_type}, which runs whole on "
                "every rank; expected a decoder alone to generate with images of all ranks: use "
                "transformers' own generate on a model that is not patched"
            )
        return text

    # ---- batches

    def text(self, batch: Mapping[str, Any], model: Any) -> Text:
        whole = model.config.text_config.is_encoder_decoder
        return WholeText.of(batch) if whole else Text.of(batch)

    def visual(self, batch: Mapping[str, Any], text: Text, model: Any) -> Visual:
        text.refuse_packed()
        config = model.config
        each = self.image_places(config)
        places = places_of(text, self.image_token(config), unit_tokens=each)
        arguments, here = self.at_hand(batch, images_of(places, each), config)
        return Images(
            count=int(here.sum()),
            unit_tokens=each,
            arguments=arguments,
            places=places,
            here=here,
            skips_padding=config.text_config.model_type in _MASKED_POSITIONS,
        )

    # ---- models

    def vision_tower(self, model: Any) -> Any:
        return model.vision_model

    def frame_tokens(self, config: Any) -> int:
        return self.image_places(config)


def is_causal(module: Any) -> bool:
    """Whether it is a decoder's attention to the text before a token."""
    return bool(getattr(module, "is_causal", False)) and hasattr(module, "layer_idx")


def layer_of(name: str, module: Any, *, of_text: bool) -> Layer:
    """A layer of the text, or one that never leaves its rank, as its module's config has it."""
    config = module.config
    heads, width = int(config.num_attention_heads), int(config.hidden_size)
    size = int(getattr(module, "head_dim", None) or width // heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return Layer(name, "self" if of_text else "local", module, heads, kv_heads, size, width)
