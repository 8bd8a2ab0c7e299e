"""OpenFlamingo: which modules attend, and what the sharded text needs.

The model's code is the package ``open_flamingo``, of which nothing is imported here, or
`ds_lvx.models.openflamingo.model`; its modules are found by name and by what they have. Before
every n-th layer of a language model of transformers a gated layer attends to the images. Both run
on this rank's shards; vision encoder and perceiver resampler run as they are, on this rank's
images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.dispatch import Dispatched
from ds_lvx.models.layers import Layer, LayerPlan
from ds_lvx.models.openflamingo import batch as batches
from ds_lvx.models.openflamingo import dimensions, forward, mpt, sized
from ds_lvx.models.openflamingo import processor as processors
from ds_lvx.models.openflamingo.attention import Attention
from ds_lvx.models.openflamingo.model import Flamingo, FlamingoConfig
from ds_lvx.models.patch import PatchedAttention, refuse_growing_rope
from ds_lvx.models.sized import Sized

_MODEL = "Flamingo"
_PARTS = ("vision_encoder", "perceiver", "lang_encoder", "media_token_id")
_SELF_ATTENTION: Mapping[str, str] = {"llama": "self_attn", "gpt_neox": "attention", "mpt": "attn"}
"""Of a layer of the language models that can be sharded, by their ``model_type``."""


class OpenFlamingo(Sized):
    """See `ds_lvx.models.contract.Family` for what each part does."""

    keys = batches.KEYS
    sized = sized
    features_key = forward.FEATURES
    skips_vision = False  # gated layers run their MLP for every token
    zigzag = True
    splits_prompt = True
    patterns: Mapping[str, str] = {
        "local": "perceiver*",
        "cross": "*.gated_cross_attn_layer.attn",
        "self": "*.decoder_layer.*",
    }
    lora_targets = (
        r".*\.decoder_layer\.(self_attn|attention|attn)\.\w+"
        r"|.*\.gated_cross_attn_layer\.attn\.(to_q|to_kv|to_out)"
    )

    # ---- patching

    def find(self, model: nn.Module) -> Any:
        return next((m for m in model.modules() if _is_model(m)), None)

    def attention_layers(self, model: Any) -> list[Layer]:
        names = {module: name for name, module in model.named_modules()}
        found = [_own_layer(names[pair[0]], pair[0]) for pair in model.perceiver.layers]
        config = model.lang_encoder.config
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        for layer in model.lang_encoder._get_decoder_layers():
            gated = layer.gated_cross_attn_layer
            if gated is not None:
                found.append(_own_layer(names[gated.attn], gated.attn))
            module = getattr(layer.decoder_layer, _SELF_ATTENTION[config.model_type])
            width = int(config.hidden_size)
            found.append(Layer(names[module], "self", module, heads, kv_heads, size, width))
        return found

    def forward(self, layer: Layer, plan: LayerPlan) -> PatchedAttention:
        if layer.kind == "cross":
            return Attention(layer.module, plan)
        kind = mpt.SelfAttention if type(layer.module).__name__ == mpt.CLASS else Dispatched
        return kind(layer.module, plan)

    def text_model(self, model: Any) -> nn.Module:
        found: nn.Module = model.lang_encoder
        return found

    def check(self, model: Any, *, sp_size: int) -> None:
        _check_language(model.lang_encoder)
        config = model.lang_encoder.config
        rope = getattr(config, "rope_parameters", None) or {}
        refuse_growing_rope(rope.get("rope_type", "default"), sp_size)
        if model.perceiver.media_time_embs is not None:
            raise NotImplementedError(
                "got a perceiver with max_num_media, which embeds an image's number in its sample; "
                "expected one without, as the published models have it"
            )
        layers = [m for m in model.lang_encoder.gated_cross_attn_layers if m is not None]
        if len({layer.attn.only_attend_immediate_media for layer in layers}) != 1:
            raise NotImplementedError(
                f"got {len(layers)} gated layers, of which some see the latest image only and some "
                "all before; expected at least one, and the same only_attend_immediate_media in "
                "all of them"
            )

    def generator(self, model: Any) -> Any:
        return model.lang_encoder

    def prepare(self, batch: ShardedBatch, arguments: Mapping[str, Any]) -> dict[str, Any]:
        # Four dimensions stop transformers from building a mask of [s, s]; nobody reads it.
        return {"attention_mask": arguments["input_ids"].new_zeros(1, 1, 1, 1)}

    def decode(self, batch: ShardedBatch, arguments: Mapping[str, Any]) -> dict[str, Any]:
        # The language model's forward asks for one, and transformers drops one that is all ones.
        return {"attention_mask": arguments.get("attention_mask")}

    def install(self, model: Any, plans: Sequence[LayerPlan]) -> None:
        forward.install(model, offloads=any(plan.features == "offload" for plan in plans))

    def encoders(self, model: Any) -> Sequence[Any]:
        """The gated layers, which stand outside of the language model's own."""
        inside = model.lang_encoder.base_model
        layers = [m for m in model.lang_encoder.gated_cross_attn_layers if m is not None]
        return (forward.Gated(inside, layers),)

    # ---- batches

    visual = staticmethod(batches.visual)
    blank = staticmethod(batches.blank)

    def frames(
        self,
        processor: Any,
        input_ids: Tensor,
        pictures: Sequence[Iterable[Any]],
        *,
        count: int,
        dtype: torch.dtype,
        begins: Tensor | None = None,
        first: int = 0,
    ) -> dict[str, Tensor]:
        made: dict[str, Tensor] = processor.frames(pictures, count=count, dtype=dtype)
        return made

    packed_frames = frames

    # ---- models

    def config_class(self) -> type[FlamingoConfig]:
        return FlamingoConfig

    def load(
        self, name: str, dtype: torch.dtype, *, trust_remote_code: bool = False, **more: Any
    ) -> Any:
        model = Flamingo.from_pretrained(name, dtype=dtype, **more)
        model.vision_encoder.requires_grad_(False)
        return model

    load_processor = staticmethod(processors.Processor.of)

    def vision_tower(self, model: Any) -> Any:
        return model.vision_encoder

    dimensions = staticmethod(dimensions.dimensions)

    def frame_tokens(self, config: Any) -> int:
        return int(config.latents)

    build = staticmethod(sized.build)
    tiny = staticmethod(sized.tiny)

    def regions(self) -> Mapping[str, str]:
        return {
            r".*\bgated_cross_attn_layers?(\.\d+)?\.attn": "cross_attention",
            r"(.*\.)?lang_encoder": "text",
            r"(.*\.)?vision_encoder": "vision",
            r"(.*\.)?perceiver": "vision",
        }


def _is_model(module: nn.Module) -> bool:
    named = any(kind.__name__ == _MODEL for kind in type(module).__mro__)
    return named and all(hasattr(module, part) for part in _PARTS)


def _own_layer(name: str, module: Any) -> Layer:
    """One of the package's own: in the perceiver, or in a gated layer."""
    heads, inside = int(module.heads), int(module.to_q.out_features)
    kind: Any = "local" if name.startswith("perceiver") else "cross"
    width = int(module.to_kv.in_features)
    return Layer(name, kind, module, heads, heads, inside // heads, width)


def _check_language(lang_encoder: Any) -> None:
    kind = lang_encoder.config.model_type
    layers = [each.decoder_layer for each in lang_encoder._get_decoder_layers()]
    attention = {
        type(getattr(each, _SELF_ATTENTION.get(kind, ""), None)).__name__ for each in layers
    }
    if kind not in _SELF_ATTENTION or (kind == "mpt" and attention != {mpt.CLASS}):
        raise NotImplementedError(
            f"got an OpenFlamingo whose language model is a {kind!r} "
            f"({type(lang_encoder).__name__} of {type(lang_encoder).__module__}); expected one of "
            f"{', '.join(_SELF_ATTENTION)} as transformers itself has them, without code of the "
            "checkpoint: of an MPT its MptForCausalLM"
        )
