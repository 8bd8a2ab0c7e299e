"""Video-LLaMA: which modules attend, and what its sharded text needs.

The model's code is that of its repository, which is no package and no model of transformers, and of
which nothing is imported here, or `ds_lvx.models.video_llama.model`; its modules are found by what
they are called. Tower and Q-Former
run on a rank's own frames. The video Q-Former, whose keys are the frames of all ranks, runs on
every rank with the same queries: no frame and no key travels. The text is split by token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_lvx.models.adapters.family import is_causal, layer_of
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.dispatch import Dispatched
from ds_lvx.models.layers import Layer, LayerPlan
from ds_lvx.models.patch import PatchedAttention, refuse_growing_rope
from ds_lvx.models.sized import Made
from ds_lvx.models.video_llama import batch as batches
from ds_lvx.models.video_llama import dimensions, forward, sized
from ds_lvx.models.video_llama import processor as processors
from ds_lvx.models.video_llama.attention import VideoAttention
from ds_lvx.models.video_llama.model import VideoLlamaConfig, VideoLlamaModel

_MODULES = {
    "visual_encoder",
    "ln_vision",
    "Qformer",
    "video_frame_position_embedding",
    "video_Qformer",
    "llama_proj",
    "llama_model",
}
_OTHERS = ("query_tokens", "video_query_tokens", "IMAGE_PATCH_TOKEN_ID")
_BERT = ("query", "key", "value", "num_attention_heads", "attention_head_size")
_CROSS = ".crossattention.self"


class VideoLlama(Made):
    """See `ds_lvx.models.contract.Family` for what each part does."""

    keys = batches.KEYS
    sized = sized
    of_class = VideoLlamaModel
    features_key = ""
    zigzag = True
    patterns: Mapping[str, str] = {"local": "Qformer*", "self": "llama_model*.self_attn"}
    lora_targets = r".*llama_model.*\.(q_proj|k_proj|v_proj|o_proj)"

    # ---- patching

    def find(self, model: nn.Module) -> Any:
        return next((m for m in model.modules() if _is_model(m)), None)

    def attention_layers(self, model: Any) -> list[Layer]:
        found = []
        for name, module in model.named_modules():
            if name.startswith("llama_model.") and is_causal(module):
                found.append(layer_of(name, module, of_text=True))
            elif all(hasattr(module, part) for part in _BERT):
                found.append(_of_bert(name, module))
        return found

    def forward(self, layer: Layer, plan: LayerPlan) -> PatchedAttention:
        kind = VideoAttention if layer.replicated else Dispatched
        return kind(layer.module, plan)

    def text_model(self, model: Any) -> nn.Module:
        found: nn.Module = model.llama_model
        return found

    def check(self, model: Any, *, sp_size: int) -> None:
        text = model.llama_model
        if not any(map(is_causal, text.modules())):
            raise NotImplementedError(
                f"got a llama_model {type(text).__name__} of {type(text).__module__}; expected "
                "transformers' own LlamaForCausalLM, which has the same weights: load them there "
                "and put it in its place"
            )
        rope = getattr(text.config, "rope_parameters", None) or {}
        refuse_growing_rope(rope.get("rope_type", "default"), sp_size)
        _check_video(model.video_Qformer)
        heard = [n for n, p in model.named_parameters() if "audio_" in n and p.requires_grad]
        if heard:
            raise NotImplementedError(
                f"got parameters of the audio branch to train, {heard[0]} and {len(heard) - 1} "
                "more; expected the video branch alone, which is sharded: build the model with "
                "frozen_audio_Qformer, or call requires_grad_(False) on them"
            )

    def prepare(self, batch: ShardedBatch, arguments: Mapping[str, Any]) -> dict[str, Any]:
        # Four dimensions stop transformers from building a mask of [s, s]; nobody reads it.
        return {"attention_mask": torch.zeros(1, 1, 1, 1, device=batch.text.device)}

    def install(self, model: Any, plans: Sequence[LayerPlan]) -> None:
        forward.install(model)

    def generator(self, model: Any) -> Any:
        return model.llama_model

    # ---- batches

    visual = staticmethod(batches.visual)
    blank = staticmethod(batches.blank)

    def media_text(self, processor: Any, times: Sequence[float] | None) -> str:
        return processors.media_text(times)

    def inputs(
        self, processor: Any, input_ids: Sequence[int], labels: Sequence[int]
    ) -> Mapping[str, Sequence[int]]:
        made: Mapping[str, Sequence[int]] = processor.with_places(input_ids, labels)
        return made

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

    def config_class(self) -> type[VideoLlamaConfig]:
        return VideoLlamaConfig

    def load(
        self, name: str, dtype: torch.dtype, *, trust_remote_code: bool = False, **more: Any
    ) -> Any:
        model = VideoLlamaModel.from_pretrained(name, dtype=dtype, **more)
        for part in (model.visual_encoder, model.ln_vision, model.Qformer, model.query_tokens):
            part.requires_grad_(False)
        return model

    def load_processor(self, name: str) -> processors.Processor:
        return processors.Processor.of(name, VideoLlamaConfig.from_pretrained(name))

    def vision_tower(self, model: Any) -> Any:
        return model.visual_encoder

    dimensions = staticmethod(dimensions.dimensions)

    def frame_tokens(self, config: Any) -> int:
        return int(config.queries)

    def regions(self) -> Mapping[str, str]:
        return {
            r".*\bllama_model\..*layers\.\d+\.self_attn": "cross_attention",
            r".*\bllama_model": "text",
            r".*\b(visual_encoder|ln_vision|(video_)?Qformer|(video_)?query_tokens)": "vision",
            r".*\b(video_frame_position_embedding|llama_proj)": "vision",
        }


def _is_model(module: nn.Module) -> bool:
    # Wrappers such as peft's have a model's attributes, too, but not its children.
    children = {name for name, _ in module.named_children()}
    return children >= _MODULES and all(hasattr(module, other) for other in _OTHERS)


def _of_bert(name: str, module: Any) -> Layer:
    """One of a Q-Former's: of the video's, cross-attention is what reaches other ranks' frames."""
    heads, size = int(module.num_attention_heads), int(module.attention_head_size)
    width = int(module.key.in_features)
    if name.startswith("video_Qformer.") and name.endswith(_CROSS):
        return Layer(name, "cross", module, heads, heads, size, width, replicated=True)
    return Layer(name, "local", module, heads, heads, size, width)


def _check_video(video: Any) -> None:
    """Refuse a video Q-Former whose attention is another one than was sharded."""
    crossing = [m for name, m in video.named_modules() if f".{name}".endswith(_CROSS)]
    if not crossing or not all(hasattr(m, part) for m in crossing for part in _BERT):
        raise NotImplementedError(
            f"got a video_Qformer {type(video).__name__} with {len(crossing)} modules "
            f"*{_CROSS}; expected at least one, with {', '.join(_BERT)}, as in the Qformer.py of "
            "its repository"
        )
    kinds = {getattr(m, "position_embedding_type", "absolute") for m in crossing}
    if kinds != {"absolute"}:
        raise NotImplementedError(
            f"got a video_Qformer with position_embedding_type {', '.join(sorted(kinds))}; "
            'expected "absolute", as the published models have it'
        )
    if getattr(getattr(video, "config", None), "gradient_checkpointing", False):
        raise NotImplementedError(
            "got a video_Qformer with config.gradient_checkpointing, whose layers would ask other "
            "ranks again in backward; set it to False: its few queries take little memory"
        )
