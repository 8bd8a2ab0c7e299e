"""Qwen-VL and Qwen-VL-Chat: which modules attend, and what the sharded text needs.

The model's code comes with its checkpoints; nothing of it is imported here, and its modules are
found by name and by what they have. A ViT and a resampler make 256 rows of an image, on the rank
that has it; they stand among the text, which is sharded and attends to itself over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_lvx.models import remote
from ds_lvx.models.inputs import generating, plain_inputs
from ds_lvx.models.layers import Layer, LayerPlan
from ds_lvx.models.patch import PatchedAttention
from ds_lvx.models.qwen_vl import batch as batches
from ds_lvx.models.qwen_vl import dimensions, forward, sized
from ds_lvx.models.qwen_vl import processor as processors
from ds_lvx.models.qwen_vl.attention import Attention
from ds_lvx.models.sized import Sized
from ds_lvx.models.text import Text
from ds_lvx.models.visual import PIXELS, Visual

_MODEL = "QWenLMHeadModel"
_ADVICE = "port modeling_qwen.py and visual.py of the checkpoint to it"
_PARTS = ("visual.attn_pool", "visual.transformer.resblocks", "h", "wte", "ln_f", "rotary_emb")
"""Of its ``transformer``; Qwen's models of text alone have no ``visual``."""


class QwenVL(Sized):
    """See `ds_lvx.models.contract.Family` for what each part does."""

    keys = batches.KEYS
    sized = sized
    features_key = ""
    zigzag = True
    patterns: Mapping[str, str] = {"local": "*visual*", "self": "*.h.*.attn"}
    lora_targets = r".*\.h\.\d+\.attn\.(c_attn|c_proj)"

    # ---- patching

    def find(self, model: nn.Module) -> Any:
        return next((m for m in model.modules() if _is_model(m)), None)

    def attention_layers(self, model: Any) -> list[Layer]:
        names = {module: name for name, module in model.named_modules()}
        visual = model.transformer.visual
        within = [block.attn for block in visual.transformer.resblocks] + [visual.attn_pool.attn]
        layers = []
        for module in within:
            count, width = int(module.num_heads), int(module.embed_dim)
            heads = count, count, width // count, width
            layers.append(Layer(names[module], "local", module, *heads))
        for block in model.transformer.h:
            module = block.attn
            heads = module.num_heads, module.num_heads, module.head_dim, module.hidden_size
            layers.append(Layer(names[module], "self", module, *heads))
        return layers

    def forward(self, layer: Layer, plan: LayerPlan) -> PatchedAttention:
        return Attention(layer.module, plan)

    def text_model(self, model: Any) -> nn.Module:
        found: nn.Module = model.transformer
        return found

    def install(self, model: Any, plans: Sequence[LayerPlan]) -> None:
        plain_inputs(model, batches.KEYS)
        forward.install(model)

    def generator(self, model: Any) -> Any:
        return generating(model)

    # ---- batches

    def visual(self, batch: Mapping[str, Any], text: Text, model: Any) -> Visual:
        return batches.visual(batch, text, model.config)

    def blank(self, model: Any) -> dict[str, Tensor]:
        side = batches.side_of(model.config)
        return {PIXELS: torch.zeros(1, 3, side, side)}

    def frame_places(self, processor: Any) -> int:
        return int(processor.places)

    def frames(
        self,
        processor: Any,
        input_ids: Tensor,
        pictures: Sequence[Iterable[Any]],
        *,
        count: int,
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        made: dict[str, Tensor] = processor.frames(pictures, dtype=dtype)
        return made

    # ---- models

    def load(
        self, name: str, dtype: torch.dtype, *, trust_remote_code: bool = False, **more: Any
    ) -> Any:
        return remote.load(name, dtype, trust_remote_code=trust_remote_code, advice=_ADVICE, **more)

    def load_processor(self, name: str) -> processors.Processor:
        visual = remote.read_section(name, "visual")
        return processors.Processor.of(
            name,
            side=int(visual["image_size"]),
            places=int(visual.get("n_queries", batches.QUERIES)),
            start=int(visual["image_start_id"]),
        )

    dimensions = staticmethod(dimensions.dimensions)

    def regions(self) -> Mapping[str, str]:
        return {
            r".*\bh\.\d+\.attn": "cross_attention",
            r".*\btransformer\.visual": "vision",
            r".*\b(transformer|lm_head)": "text",
        }

    def vision_tower(self, model: Any) -> Any:
        return model.transformer.visual

    frame_tokens = staticmethod(batches.queries_of)


def _is_model(module: Any) -> bool:
    named = any(kind.__name__ == _MODEL for kind in type(module).__mro__)
    inside = getattr(module, "transformer", None)
    return named and all(_has(inside, part) for part in _PARTS)


def _has(module: Any, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module is not None
