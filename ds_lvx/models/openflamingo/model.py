"""OpenFlamingo as a model of transformers, with one config and one file of weights.

Names and numbers are those of the package ``open_flamingo``, so that its checkpoints fit
(`ds_lvx.models.openflamingo.convert`). A batch is the package's: ``vision_x`` beside the text.

Shapes: ``B`` samples, ``T`` text tokens, ``N`` images of a sample, ``n`` latents of an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MptForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HEADS = 8
"""Of the perceiver and of the gated layers, in every checkpoint."""


class FlamingoConfig(PreTrainedConfig):
    """What a model is built from.

    Args:
        text_config: of the language model, with its ``model_type``.
        vision_config: of CLIP's tower.
        media_token_id: of ``<image>``.
        eoc_token_id: of ``<|endofchunk|>``.
        cross_attn_every_n_layers: a gated layer stands before every n-th of the language model.
        only_attend_immediate_media: text sees the latest image alone, not all before it.
        latents, depth, dim_head: of the perceiver; the size of a head is the gated layers' as well.
    """

    model_type = "openflamingo"
    attribute_map: ClassVar[dict[str, str]] = {"image_token_id": "media_token_id"}
    sub_configs: ClassVar[Mapping[str, Any]] = {
        "text_config": AutoConfig,
        "vision_config": CLIPVisionConfig,
    }

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        *,
        media_token_id: int = 0,
        eoc_token_id: int = 0,
        cross_attn_every_n_layers: int = 1,
        only_attend_immediate_media: bool = True,
        latents: int = 64,
        depth: int = 6,
        dim_head: int = 64,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, Mapping):
            text_config = CONFIG_MAPPING[text_config["model_type"]](**text_config)
        if isinstance(vision_config, Mapping):
            vision_config = CLIPVisionConfig(**vision_config)
        if text_config is not None and hasattr(text_config, "max_seq_len"):
            text_config.max_position_embeddings = text_config.max_seq_len  # an MPT's own word
        self.text_config, self.vision_config = text_config, vision_config
        self.media_token_id, self.eoc_token_id = media_token_id, eoc_token_id
        self.cross_attn_every_n_layers = cross_attn_every_n_layers
        self.only_attend_immediate_media = only_attend_immediate_media
        self.latents, self.depth, self.dim_head = latents, depth, dim_head
        kwargs["tie_word_embeddings"] = bool(getattr(text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)


def feed_forward(size: int) -> nn.Sequential:
    """An MLP with its norm."""
    return nn.Sequential(
        nn.LayerNorm(size),
        nn.Linear(size, 4 * size, bias=False),
        nn.GELU(),
        nn.Linear(4 * size, size, bias=False),
    )


class Projections(nn.Module):
    """Those of an attention from ``size`` to features of width ``source``."""

    def __init__(self, size: int, source: int, *, dim_head: int) -> None:
        super().__init__()
        self.heads, self.scale = HEADS, dim_head**-0.5
        self.to_q = nn.Linear(size, HEADS * dim_head, bias=False)
        self.to_kv = nn.Linear(source, 2 * HEADS * dim_head, bias=False)
        self.to_out = nn.Linear(HEADS * dim_head, size, bias=False)

    def attend(self, x: Tensor, features: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[..., T, size]`` over ``[..., s, source]``, with a bias of the scores."""
        given = (self.to_q(x), *self.to_kv(features).chunk(2, dim=-1))
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(-3, -2) for each in given)
        out = F.scaled_dot_product_attention(q, k, v, bias, scale=self.scale)
        return cast(Tensor, self.to_out(out.transpose(-3, -2).flatten(-2)))


class PerceiverAttention(Projections):
    """Of the latents to an image and to themselves."""

    def __init__(self, size: int, *, dim_head: int) -> None:
        super().__init__(size, size, dim_head=dim_head)
        self.norm_media, self.norm_latents = nn.LayerNorm(size), nn.LayerNorm(size)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """``latents [B, N, n, size]`` of images ``[B, N, patches, size]``."""
        latents = self.norm_latents(latents)
        return self.attend(latents, torch.cat((self.norm_media(x), latents), dim=-2))


class PerceiverResampler(nn.Module):
    """Makes n tokens of an image."""

    def __init__(self, size: int, *, latents: int, depth: int, dim_head: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, size))
        self.frame_embs = self.media_time_embs = None
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(size, dim_head=dim_head), feed_forward(size)])
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, 1, patches, size]`` to ``[B, N, n, size]``."""
        x = x.flatten(2, 3)
        latents = self.latents.expand(*x.shape[:2], -1, -1)
        for layer in self.layers:
            attend, feed = cast(nn.ModuleList, layer)
            latents = attend(x, latents) + latents
            latents = feed(latents) + latents
        return cast(Tensor, self.norm(latents))


class MaskedCrossAttention(Projections):
    """Of text to the latest image, or to all before it."""

    def __init__(self, size: int, source: int, *, dim_head: int, latest: bool) -> None:
        super().__init__(size, source, dim_head=dim_head)
        self.norm = nn.LayerNorm(size)
        self.only_attend_immediate_media = latest

    def forward(self, x: Tensor, media: Tensor, media_locations: Tensor) -> Tensor:
        """``x [B, T, size]`` over ``media [B, N, n, source]``.

        Args:
            x: the text.
            media: the images.
            media_locations: bool ``[B, T]``, where their tokens stand.
        """
        latest = self.only_attend_immediate_media
        time = media_locations.cumsum(-1)[..., None]
        number = torch.arange(1, media.shape[1] + 1, device=x.device)
        number = number.repeat_interleave(media.shape[2])
        unseen = time != number if latest else time < number
        bias = x.new_zeros(unseen.shape).masked_fill(unseen, torch.finfo(x.dtype).min)
        out = self.attend(self.norm(x), media.flatten(1, 2), bias[:, None])
        return out.masked_fill(time == 0, 0) if latest else out


class GatedCrossAttentionBlock(nn.Module):
    """Attention and MLP, each behind a gate that is shut at first."""

    def __init__(self, size: int, source: int, *, dim_head: int, latest: bool) -> None:
        super().__init__()
        self.attn = MaskedCrossAttention(size, source, dim_head=dim_head, latest=latest)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = feed_forward(size)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, media: Tensor, media_locations: Tensor) -> Tensor:
        """As of `MaskedCrossAttention`."""
        x = self.attn(x, media, media_locations=media_locations) * self.attn_gate.tanh() + x
        return cast(Tensor, self.ff(x) * self.ff_gate.tanh() + x)


class FlamingoLayer(nn.Module):
    """A layer of the language model, and the gated one before it, if there is one."""

    def __init__(self, gated: GatedCrossAttentionBlock | None, layer: nn.Module) -> None:
        super().__init__()
        self.gated_cross_attn_layer, self.decoder_layer = gated, layer
        self.vis_x: Tensor | None = None
        self.media_locations: Tensor | None = None

    def condition_vis_x(self, vis_x: Tensor | None) -> None:
        """Hand it the images."""
        self.vis_x = vis_x

    def condition_media_locations(self, media_locations: Tensor | None) -> None:
        """Hand it the places of their tokens."""
        self.media_locations = media_locations

    def forward(self, lang_x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns."""
        if self.gated_cross_attn_layer is not None:
            lang_x = self.gated_cross_attn_layer(
                lang_x, self.vis_x, media_locations=self.media_locations
            )
        return self.decoder_layer(lang_x, *args, **kwargs)


class Language(nn.Module):
    """What a language model of transformers becomes by gated layers.

    Attributes:
        layers_at: where its layers are.
        media_token_id: of ``<image>``.
    """

    layers_at: str
    media_token_id: int

    def add_gated(self, config: FlamingoConfig) -> None:
        """Put the gated layers in."""
        own: Any = self
        every = config.cross_attn_every_n_layers
        layers = [
            FlamingoLayer(self._gated(config) if (number + 1) % every == 0 else None, layer)
            for number, layer in enumerate(self._get_decoder_layers())
        ]
        parent, _, name = self.layers_at.rpartition(".")
        setattr(self.get_submodule(parent), name, nn.ModuleList(layers))
        self.media_token_id = config.media_token_id
        own.generation_config.eos_token_id = config.eoc_token_id

    @staticmethod
    def _gated(config: FlamingoConfig) -> GatedCrossAttentionBlock:
        return GatedCrossAttentionBlock(
            config.text_config.hidden_size,
            config.vision_config.hidden_size,
            dim_head=config.dim_head,
            latest=config.only_attend_immediate_media,
        )

    def _get_decoder_layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.get_submodule(self.layers_at))

    @property
    def gated_cross_attn_layers(self) -> list[GatedCrossAttentionBlock | None]:
        """Of each layer; None where there is none."""
        return [cast(Any, layer).gated_cross_attn_layer for layer in self._get_decoder_layers()]

    def clear_conditioned_layers(self) -> None:
        """Layers hold on to no images."""
        for layer in self._get_decoder_layers():
            cast(Any, layer).condition_vis_x(None)
            cast(Any, layer).condition_media_locations(None)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """The language model's output."""
        for layer in self._get_decoder_layers():
            cast(Any, layer).condition_media_locations(input_ids == self.media_token_id)
        return super().forward(input_ids=input_ids, **kwargs)


class LlamaFlamingo(Language, LlamaForCausalLM):
    """On a Llama."""

    layers_at = "model.layers"


class NeoXFlamingo(Language, GPTNeoXForCausalLM):
    """On a GPT-NeoX."""

    layers_at = "gpt_neox.layers"


class MptFlamingo(Language, MptForCausalLM):
    """On an MPT."""

    layers_at = "transformer.blocks"


LANGUAGES: Mapping[str, Any] = {
    "llama": LlamaFlamingo,
    "gpt_neox": NeoXFlamingo,
    "mpt": MptFlamingo,
}
"""By the ``model_type`` of the language model."""


class VisionEncoder(CLIPVisionModel):
    """CLIP's tower."""

    @property
    def image_size(self) -> int:
        """Pixels of an image by side."""
        config: Any = self.config
        return int(config.image_size)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """``[images, 3, side, side]`` to what is pooled, and ``[images, patches, size]``."""
        out = super().forward(pixel_values=pixels)
        return out.pooler_output, out.last_hidden_state[:, 1:]


class Flamingo(PreTrainedModel):
    """The model. Its tower has no gradients, as in the package."""

    config_class = FlamingoConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: Any = ("FlamingoLayer",)

    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__(config)
        self.media_token_id, self.eoc_token_id = config.media_token_id, config.eoc_token_id
        self.vision_encoder = VisionEncoder(config.vision_config)
        self.perceiver = PerceiverResampler(
            config.vision_config.hidden_size,
            latents=config.latents,
            depth=config.depth,
            dim_head=config.dim_head,
        )
        self.lang_encoder = LANGUAGES[config.text_config.model_type](config.text_config)
        self.lang_encoder.add_gated(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GatedCrossAttentionBlock):
            initialization.zeros_(module.attn_gate)
            initialization.zeros_(module.ff_gate)
        elif isinstance(module, PerceiverResampler):
            initialization.normal_(module.latents)

    def get_input_embeddings(self) -> nn.Module:
        """The text's."""
        return cast(nn.Module, self.lang_encoder.get_input_embeddings())

    def get_output_embeddings(self) -> nn.Module:
        """The text's."""
        return cast(nn.Module, self.lang_encoder.get_output_embeddings())

    def forward(self, input_ids: Tensor, vision_x: Tensor | None = None, **text: Any) -> Any:
        """The language model's output.

        Args:
            input_ids: ``[B, T]``.
            vision_x: ``[B, N, 1, 3, side, side]``; None: one blank image a sample.
            text: of the language model: ``attention_mask``, ``labels`` and others.
        """
        if vision_x is None:
            side = self.vision_encoder.image_size
            vision_x = torch.zeros(len(input_ids), 1, 1, 3, side, side, device=input_ids.device)
        with torch.no_grad():
            tokens = self.vision_encoder(vision_x.to(self.dtype).flatten(0, 2))[1]
        features = self.perceiver(tokens.unflatten(0, vision_x.shape[:3]))
        for layer in self.lang_encoder._get_decoder_layers():
            layer.condition_vis_x(features)
        try:
            return self.lang_encoder(input_ids=input_ids, **text)
        finally:
            self.lang_encoder.clear_conditioned_layers()
