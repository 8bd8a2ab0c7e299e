"""What a benchmark trains: a mllama cut to size, its batch, and the ds_config of a setting.

The cross-attention has its real dimensions by default; everything else is small, because it is not
what is measured. Random weights, nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from ds_lvx.plan.memory import Setting

_BUCKET_ELEMENTS = 2**23  # two of the largest weights that train here
_KEYS_AND_VALUES = ("k_proj", "v_proj", "k_norm")


@dataclass(frozen=True)
class Case:
    """A mllama and the batch that goes through it.

    Attributes:
        hidden, heads, kv_heads: of the text model; those of Llama-3.2-11B-Vision.
        cross_layers, self_layers: of the text model, cross-attention first.
        mlp, vocabulary: of the text model.
        text_tokens: of the one sample, over all ranks.
        vision_hidden, vision_heads, vision_mlp, vision_layers, vision_global_layers: of the vision
            tower.
        image_size, patch_size, tiles: of a frame.
        trains: ``"kv"`` (what makes K and V of the visual features) or ``"cross"`` (all of the
            cross-attention layers). The text's other weights are frozen.
        features: ``"trained"`` (the projector trains, so the features need a gradient),
            ``"frozen"``, or ``"tower"`` (the vision tower trains as well).
    """

    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    cross_layers: int = 8
    self_layers: int = 0
    mlp: int = 64
    vocabulary: int = 512
    text_tokens: int = 256
    vision_hidden: int = 16
    vision_heads: int = 2
    vision_mlp: int = 32
    vision_layers: int = 1
    vision_global_layers: int = 1
    image_size: int = 8
    patch_size: int = 1
    tiles: int = 1
    trains: str = "kv"
    features: str = "trained"

    @property
    def frame_tokens(self) -> int:
        """Visual tokens of a frame."""
        patches: int = (self.image_size // self.patch_size) ** 2 + 1
        return self.tiles * patches


def build_model(case: Case) -> MllamaForConditionalGeneration:
    """The model in bf16 on the CPU, gates open; only what the case trains wants gradients."""
    config = MllamaConfig(
        vision_config=_vision_config(case),
        text_config=_text_config(case),
        image_token_index=case.vocabulary,
    )
    with _default_dtype(torch.bfloat16):
        model = MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_trains(name, case))
        if name.endswith("_gate"):
            # Shut, as in a new model, the gradients of K and V would be zeros.
            torch.nn.init.constant_(parameter, 1.0)
    return model


def _text_config(case: Case) -> MllamaTextConfig:
    return MllamaTextConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        num_hidden_layers=case.cross_layers + case.self_layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        intermediate_size=case.mlp,
        cross_attention_layers=list(range(case.cross_layers)),
        max_position_embeddings=max(case.text_tokens, 2),
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        bos_token_id=0,  # no sequence here begins, ends or is padded by a token
        eos_token_id=0,
        pad_token_id=None,
    )


def _vision_config(case: Case) -> MllamaVisionConfig:
    # As in the model itself, the features are the last output beside those of five layers, or of
    # all, where there are fewer.
    taken = list(range(case.vision_layers))[-5:]
    return MllamaVisionConfig(
        hidden_size=case.vision_hidden,
        num_hidden_layers=case.vision_layers,
        num_global_layers=case.vision_global_layers,
        attention_heads=case.vision_heads,
        intermediate_size=case.vision_mlp,
        image_size=case.image_size,
        patch_size=case.patch_size,
        max_num_tiles=case.tiles,
        supported_aspect_ratios=[[1, tiles] for tiles in range(1, case.tiles + 1)],
        intermediate_layers_indices=taken,
        vision_output_dim=case.vision_hidden * (1 + len(taken)),
    )


def _trains(name: str, case: Case) -> bool:
    if "vision_model" in name:
        return case.features == "tower"
    if "multi_modal_projector" in name:
        return case.features != "frozen"
    if case.trains == "cross":
        return "cross_attn" in name or any(
            f"language_model.layers.{layer}." in name for layer in range(case.cross_layers)
        )
    return "cross_attn" in name and any(part in name for part in _KEYS_AND_VALUES)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_batch(case: Case, *, frames: int, ranks: int, seed: int = 0) -> dict[str, Tensor]:
    """One sample with ``frames`` frames a rank, of which this rank's are there.

    Every text token sees every frame. Every rank makes the same text.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (1, case.text_tokens)
    tokens = torch.randint(1, case.vocabulary, shape, generator=generator)
    frame = (1, frames, case.tiles, 3, case.image_size, case.image_size)
    return {
        "input_ids": tokens,
        "labels": tokens,
        "pixel_values": torch.randn(1, 1, *frame[2:], generator=generator)
        .to(torch.bfloat16)
        .expand(frame),
        "aspect_ratio_ids": torch.full((1, frames), case.tiles),
        "aspect_ratio_mask": torch.ones(1, frames, case.tiles, dtype=torch.long),
        "visible_images": torch.tensor([0, frames * ranks]).expand(*shape, 2),
    }


def ds_config(setting: Setting, case: Case, *, ranks: int) -> dict[str, Any]:
    """The ds_config that runs a setting, on ``ranks`` ranks that share one sample."""
    rules: list[Mapping[str, Any]] = [{"match": "*vision_model*", "method": "none"}]
    rules.append({"match": "*.cross_attn", **setting.rule()})
    if case.self_layers > 0:
        rules.append({"match": "*language_model*.self_attn", "method": "ulysses"})
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": _BUCKET_ELEMENTS,
            "allgather_bucket_size": _BUCKET_ELEMENTS,
        },
        "ds_lvx": {"sequence_parallel_size": ranks, "layers": rules},
    }
    if setting.checkpointing:
        config["activation_checkpointing"] = {}
    return config
