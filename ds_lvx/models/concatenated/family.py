"""What families share whose visual tokens stand among the text's.

A rank encodes its own images and frames and holds their tokens; text is dealt around them, so that
tokens and work are even. No visual embedding is sent, only what attention sends of every token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.concatenated.batch import Arrange, Sequences, Unit, Units
from ds_lvx.models.concatenated.deal import owners
from ds_lvx.models.concatenated.forward import Embed, Encoded
from ds_lvx.models.concatenated.prefixes import share
from ds_lvx.models.dispatch import Dispatched
from ds_lvx.models.layers import Layer, LayerPlan
from ds_lvx.models.media import Held, Medium, Shown
from ds_lvx.models.patch import PatchedAttention, refuse_growing_rope
from ds_lvx.models.sized import Made
from ds_lvx.models.text import Text
from ds_lvx.models.visual import Visual

SLIDING = "sliding_attention"


class Concatenated(Made):
    """Base of these families; a family says what its units are and how its tower runs.

    Attributes:
        of_text, within: classes of attention: of the text to itself, and within a unit.
        sources: entries of a batch that have pixels.
        takes: the model's arguments of units that `arrange` makes; the first has their pixels.
        text_name: what `inner` calls its text model; `lora_targets` and ``patterns`` have it, too.
        embed: puts embeddings together.
        layer_types: that a layer of the text may be of.
        unbroken: see `Sequences`.
    """

    features_key = ""
    sized_media = True
    shares_prefixes = True
    lora_targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"
    of_text: type[nn.Module] | tuple[type[nn.Module], ...]
    within: type[nn.Module] | tuple[type[nn.Module], ...]
    sources: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    text_name: str = "language_model"
    embed: type[Embed] = Embed
    layer_types: tuple[str, ...] = ("full_attention",)
    unbroken: bool = False

    @abstractmethod
    def units(self, batch: Mapping[str, Any], ids: Tensor, config: Any) -> list[Unit]:
        """The images and frames of a batch, in the order of its rows and their tokens.

        Args:
            batch: what the caller gave; entries that are None are left out. With local frames its
                pixels are this rank's; all else is of the whole.
            ids: int64 ``[B, T]``, on the CPU.
            config: of the model.

        Raises:
            ValueError: entries that contradict each other or the text.
        """

    @abstractmethod
    def visual_tokens(self, ids: Tensor, config: Any) -> Tensor:
        """bool ``[B, T]``: the tokens that stand for units."""

    def positions(self, batch: Mapping[str, Any], text: Text, config: Any) -> Tensor | None:
        """The model's own positions of the whole rows, ``[..., B, T]``; None: places in the row.

        Here those that the batch has, of one axis.

        Raises:
            ValueError: the batch has others than the model can have.
            NotImplementedError: samples packed into a row.
        """
        whole = Text.of(batch)
        whole.refuse_packed()
        given = whole.position_ids
        return None if given is None else given.cpu().expand(text.shape)

    def pixels(self, batch: Mapping[str, Any], config: Any) -> dict[str, Tensor]:
        """The pixels at hand by source, with the rows of units one after the other.

        Args:
            batch: as of `units`.
            config: of the model.

        Raises:
            ValueError: they are no tensors, or of shapes that the tower does not take.
        """
        given = {key: batch[key] for key in self.sources if key in batch}
        for key, value in given.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"got {key} of type {type(value).__name__}; expected a tensor: use the model's "
                    'own processor with return_tensors="pt"'
                )
        return given

    @abstractmethod
    def arrange(self, config: Any) -> Arrange:
        """What makes the model's arguments of some units, one or more, and the rows of each in its
        source. What follows from sizes is made there, so that nobody reads them on a device.

        Args:
            config: of the model.
        """

    @staticmethod
    @abstractmethod
    def encode(module: Any, given: Mapping[str, Any]) -> Encoded:
        """Run the tower of the inner model, once whatever the units are.

        Args:
            module: `inner`.
            given: what `arrange` made, or `blank`; its tensors are on the device.
        """

    def inner(self, model: Any) -> Any:
        """The module that has tower and text, and puts embeddings together."""
        return model.model

    # ---- patching

    def find(self, model: nn.Module) -> Any:
        return next((m for m in model.modules() if isinstance(m, self.of_class)), None)

    def attention_layers(self, model: Any) -> list[Layer]:
        kinds = (self.of_text, self.within)
        return [
            self.layer(name, module)
            for name, module in model.named_modules()
            if isinstance(module, kinds)
        ]

    def layer(self, name: str, module: Any) -> Layer:
        """An attention module of the text or of the tower."""
        of_text = isinstance(module, self.of_text)
        config = module.config
        heads = next(
            int(getattr(config, key)) for key in _HEADS if getattr(config, key, None) is not None
        )
        width = int(config.hidden_size)
        # By the module where it says so: layers of a model may have other heads than its config.
        groups = getattr(module, "num_key_value_groups", None)
        if groups is None:
            kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        else:
            kv_heads = heads // int(groups)
        size = int(getattr(module, "head_dim", None) or width // heads)
        return Layer(name, "self" if of_text else "local", module, heads, kv_heads, size, width)

    def forward(self, layer: Layer, plan: LayerPlan) -> PatchedAttention:
        return Dispatched(layer.module, plan)

    def text_model(self, model: Any) -> nn.Module:
        inside = self.inner(model)
        found: nn.Module | None = getattr(inside, self.text_name, None)
        if found is None:
            have = ", ".join(name for name, _ in inside.named_children())
            raise NotImplementedError(
                f"got a {type(inside).__name__} without {self.text_name!r}, the text model by "
                f"text_name of {type(self).__name__}; expected one of its modules, {have}: set "
                "text_name, or override text_model or inner"
            )
        return found

    def check(self, model: Any, *, sp_size: int) -> None:
        config: Any = self.text_model(model).config
        types = getattr(config, "layer_types", None) or ()
        others = [n for n, kind in enumerate(types) if kind not in self.layer_types]
        if others:
            kind, allowed = types[others[0]], " or ".join(f'"{each}"' for each in self.layer_types)
            do = "take a model whose text attends to all of it in every layer"
            if kind == SLIDING:
                do = (
                    "set use_sliding_window to false in the text's config, as the published "
                    "models have it"
                )
            raise NotImplementedError(
                f'got a text model whose layer {others[0]} is of type "{kind}"; expected '
                f"{allowed} in every layer, which lvx, ring and ulysses run: {do}"
            )
        rope = getattr(config, "rope_parameters", None) or {}
        for each in (rope, *(part for part in rope.values() if isinstance(part, Mapping))):
            refuse_growing_rope(each.get("rope_type", "default"), sp_size)

    def prepare(self, batch: ShardedBatch, arguments: Mapping[str, Any]) -> dict[str, Any]:
        # Four dimensions stop transformers from building a mask of [s, s]; nobody reads it.
        return {"attention_mask": torch.zeros(1, 1, 1, 1, device=batch.text.device)}

    def generator(self, model: Any) -> Any:
        return model

    def install(self, model: Any, plans: Sequence[LayerPlan]) -> None:
        hook = self.embed(self.encode, self.takes)
        self.inner(model).register_forward_pre_hook(hook, with_kwargs=True)

    # ---- batches

    def text(self, batch: Mapping[str, Any], model: Any) -> Text:
        config = model.config
        given = {**batch, "position_ids": None}
        text = Text.of(given).each(lambda tensor: tensor.cpu())
        units = self.units(batch, text.input_ids, config)
        made = Sequences.with_units(text, self.visual_tokens(text.input_ids, config), units)
        return replace(made.at(self.positions(batch, text, config)), unbroken=self.unbroken)

    def share_prefixes(
        self,
        text: Text,
        batch: Mapping[str, Any],
        model: Any,
        *,
        together: Sequence[int] | None = None,
    ) -> Text:
        assert isinstance(text, Sequences)
        return share(text, self.pixels(batch, model.config), together)

    def visual(self, batch: Mapping[str, Any], text: Text, model: Any) -> Visual:
        return Units.of(text, self.pixels(batch, model.config), self.arrange(model.config))

    def owned(self, tokens: Sequence[int], rank: int, size: int) -> list[int]:
        return [unit for unit, owner in enumerate(owners(tokens, size)) if owner == rank]

    # ---- data

    def shown(self, processor: Any, medium: Medium) -> Shown:
        found: Shown = self._own(processor, "shown").shown(medium)
        return found

    def media(
        self, processor: Any, samples: Sequence[Held], *, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        made: dict[str, Tensor] = self._own(processor, "media").media(samples, dtype=dtype)
        return made

    def _own(self, processor: Any, part: str) -> Any:
        """A processor of this package, which has the part."""
        if not hasattr(processor, part):
            raise self.lacks(part, f"training on images and videos with {type(processor).__name__}")
        return processor

    # ---- models

    def regions(self) -> Mapping[str, str]:
        return {
            rf".*\b{self.text_name}\.layers\.\d+\.self_attn": "cross_attention",
            # Its layers as well: one that is checkpointed runs again by itself.
            rf".*\b{self.text_name}(\.layers\.\d+)?": "text",
            r".*\blm_head": "text",
            r".*\b(visual|vision_tower|vision_model)": "vision",
            r".*\b(multi_modal_projector|projector|connector)": "vision",
        }


_HEADS = ("num_attention_heads", "num_heads")
