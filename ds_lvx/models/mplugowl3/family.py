"""mPLUG-Owl3: which modules attend, and what the sharded text model needs.

The model's code comes with its checkpoints; nothing of it is imported here, and its modules are
found by name and by what they have. Text layers are Qwen2's. In some of them, the hyper layers, the
text attends to itself and to all images whose tokens are not behind it: in one softmax (release
241101), or in two whose results a gate mixes, to images before the token only (240728).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ds_lvx.models import remote
from ds_lvx.models.inputs import EncodePixels, generating, plain_inputs
from ds_lvx.models.layers import Kind, Layer, LayerPlan
from ds_lvx.models.mplugowl3 import batch as batches
from ds_lvx.models.mplugowl3 import dimensions, forward, sized
from ds_lvx.models.mplugowl3 import processor as processors
from ds_lvx.models.mplugowl3.attention import Attention, is_gated
from ds_lvx.models.patch import PatchedAttention
from ds_lvx.models.sized import Sized
from ds_lvx.models.visual import PIXELS, Visual

_MODEL = "mPLUGOwl3Model"
_IMAGES = "v_kv_proj"
"""Of a hyper layer's attention; its rule goes by this name, not by that of the text's attention."""
_ADVICE = (
    "the files that come with mPLUG-Owl3's checkpoints are for transformers 4; take modeling and "
    "configuration files that were ported to 5"
)


class MPlugOwl3(Sized):
    """See `ds_lvx.models.contract.Family` for what each part does."""

    keys = batches.KEYS
    sized = sized
    features_key = forward.FEATURES
    skips_vision = False  # so that what makes K and V of images always has a gradient
    zigzag = True
    splits_prompt = True
    shares_prefixes = True
    patterns: Mapping[str, str] = {
        "local": "*vision_model*",
        "cross": f"*.{_IMAGES}",
        "self": "*language_model*.self_attn",
    }
    without: Mapping[str, str] = {"ulysses": "release 241101 needs lse of its hyper layers"}
    lora_targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|v_kv_proj)"

    # ---- patching

    def find(self, model: nn.Module) -> Any:
        return next((m for m in model.modules() if type(m).__name__ == _MODEL), None)

    def attention_layers(self, model: Any) -> list[Layer]:
        vision = [
            _layer(f"vision_model.{name}", module, model.config.vision_config)
            for name, module in model.vision_model.named_modules()
            if hasattr(module, "q_proj")
        ]
        text = [
            _layer(f"language_model.model.layers.{number}.self_attn", layer.self_attn, model.config)
            for number, layer in enumerate(model.language_model.model.layers)
        ]
        return [*vision, *text]

    def forward(self, layer: Layer, plan: LayerPlan) -> PatchedAttention:
        one_softmax = plan.kind == "cross" and not is_gated(layer.module)
        if one_softmax and plan.method in ("ulysses", "auto"):
            raise NotImplementedError(
                f"ds_lvx.layers: got method {plan.method!r} for {plan.name}, a hyper layer of "
                "mPLUG-Owl3, whose softmax over images and text needs lse; use 'lvx' or 'ring'"
            )
        if plan.features == "offload":
            raise NotImplementedError(
                f'ds_lvx.layers: got features "offload" for {plan.name}, a hyper layer of '
                "mPLUG-Owl3, whose own forward norms the features on the device; remove it from "
                "the rule, and checkpoint the layers"
            )
        return Attention(layer, plan)

    def text_model(self, model: Any) -> nn.Module:
        return model.language_model

    def install(self, model: Any, plans: Sequence[LayerPlan]) -> None:
        text = model.language_model
        # Before the hook that checks the features and shares them.
        text.register_forward_pre_hook(forward.Pack(text), with_kwargs=True, prepend=True)
        once = forward.EncodeOnce(model)
        model.register_forward_pre_hook(once, with_kwargs=True)
        # Before that: generation is the text model's own.
        encode = EncodePixels(once.encoded, PIXELS, forward.FEATURES)
        text.register_forward_pre_hook(encode, with_kwargs=True, prepend=True)
        plain_inputs(text, (forward.FEATURES, batches.OFFSETS))

    def generator(self, model: Any) -> Any:
        return generating(model.language_model)

    # ---- batches

    visual = staticmethod(batches.visual)

    def complete(self, visual: Visual, model: Any) -> Visual:
        assert isinstance(visual, batches.Images)
        return replace(visual, strictly=_is_strict(model))

    blank = staticmethod(batches.blank)

    def media_text(self, processor: Any, times: Sequence[float] | None) -> str:
        return processors.media_text(processor.tokenizer, times)

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
        made: dict[str, Tensor] = processor.frames(input_ids, pictures, dtype=dtype)
        return made

    packed_frames = frames

    # ---- models

    def load(
        self, name: str, dtype: torch.dtype, *, trust_remote_code: bool = False, **more: Any
    ) -> Any:
        model = remote.load(
            name, dtype, trust_remote_code=trust_remote_code, advice=_ADVICE, **more
        )
        remote.restore_buffers(model)
        return model

    load_processor = staticmethod(processors.Processor.of)
    dimensions = staticmethod(dimensions.dimensions)
    frame_tokens = staticmethod(batches.image_tokens)

    def regions(self) -> Mapping[str, str]:
        return {
            # Of a hyper layer's attention the rest is the text's as well.
            rf".*\b{_IMAGES}": "cross_attention",
            r".*\blanguage_model(\.model\.layers\.\d+)?": "text",
            r".*\bvision_model": "vision",
            r".*\bvision2text_model": "vision",
        }

    def vision_tower(self, model: Any) -> Any:
        return model.vision_model


def _is_strict(model: Any) -> bool:
    """Whether it is release 240728, in which a token does not see the image that it stands for."""
    return any(is_gated(layer.self_attn) for layer in model.language_model.model.layers)


def _layer(name: str, module: Any, config: Any) -> Layer:
    kind: Kind = "local" if name.startswith("vision_model") else "self"
    if hasattr(module, _IMAGES):
        kind, name = "cross", f"{name}.{_IMAGES}"
    heads = int(config.num_attention_heads)
    return Layer(
        name,
        kind,
        module,
        heads,
        int(getattr(config, "num_key_value_heads", heads)),
        int(config.hidden_size) // heads,
        int(config.hidden_size),
    )
