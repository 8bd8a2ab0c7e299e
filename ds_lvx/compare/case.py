"""The model that is trained to measure: its size, weights, batch, rules and parts.

All that is particular to one family of models is here. Sizes are those of Llama-3.2-Vision unless
they are cut; weights are random, or a checkpoint's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from ds_lvx.config import LVXConfig
from ds_lvx.plan.memory import Setting

FAMILY = "mllama"
REGIONS: Mapping[str, str] = {
    r".*\bcross_attn": "cross_attention",
    # Its layers as well: one that is checkpointed runs again by itself.
    r".*\blanguage_model(\.layers\.\d+)?": "text",
    r".*\blm_head": "text",
    r".*\bvision_model": "vision",
    r".*\bmulti_modal_projector": "vision",
}
"""Part of the model, by a regular expression for the whole name of a module."""

_BUCKET_ELEMENTS = 2**23  # two of the largest weights that train for the memory's measurement
_KEYS_AND_VALUES = ("k_proj", "v_proj", "k_norm")


@dataclass(frozen=True)
class Case:
    """A model's sizes, and what of it trains.

    Attributes:
        hidden, heads, kv_heads: of the text model; those of Llama-3.2-11B-Vision.
        cross_layers, self_layers: of the text model, cross-attention first.
        mlp, vocabulary: of the text model.
        text_tokens: of the one sample, over all ranks.
        vision_hidden, vision_heads, vision_mlp, vision_layers, vision_global_layers: of the vision
            tower.
        image_size, patch_size, tiles: of a frame.
        trains: of the text model, ``"kv"`` (what makes K and V of the visual features), ``"cross"``
            (all of the cross-attention layers) or ``"all"``.
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


EIGHTH = Case(
    cross_layers=1,
    self_layers=4,
    mlp=14336,
    vision_hidden=1280,
    vision_heads=16,
    vision_mlp=5120,
    vision_layers=4,
    vision_global_layers=1,
    image_size=560,
    patch_size=14,
    tiles=4,
    trains="cross",
)
"""An eighth of Llama-3.2-11B-Vision, but for its vocabulary."""

LLAMA = replace(
    EIGHTH,
    cross_layers=8,
    self_layers=32,
    vocabulary=128256,
    vision_layers=32,
    vision_global_layers=8,
    trains="all",
    features="tower",
)
"""Llama-3.2-11B-Vision."""

TINY = Case(
    hidden=512,
    heads=8,
    kv_heads=4,
    cross_layers=2,
    self_layers=2,
    mlp=1024,
    vocabulary=128,
    vision_layers=2,
    image_size=112,
    patch_size=7,
    trains="all",
    features="tower",
)
"""A model of some nine million weights, with heads of a real size and 257 visual tokens a frame."""

RANDOM: Mapping[str, Case] = {"tiny": TINY, FAMILY: LLAMA}
"""Models with random weights, by name; any other name is that of a checkpoint."""


def cut(case: Case, *, hidden: int | None = None, **layers: int | None) -> Case:
    """A model of fewer or narrower layers; None leaves a size as it is.

    Args:
        case: what is cut.
        hidden: the size of a head stays, and how many query heads share one of K and V.
        layers: ``cross_layers``, ``self_layers``, ``vision_layers``.

    Raises:
        ValueError: a ``hidden`` that is no multiple of the size of a head, or no layers.
    """
    changes: dict[str, Any] = {name: value for name, value in layers.items() if value is not None}
    for name, value in changes.items():
        least = 0 if name == "self_layers" else 1
        if value < least:
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: got {value}; expected at least {least}")
    if "vision_layers" in changes:
        changes["vision_global_layers"] = min(case.vision_global_layers, changes["vision_layers"])
    if hidden is not None:
        head_dim = case.hidden // case.heads
        heads, rest = divmod(hidden, head_dim)
        if rest or heads < 1:
            raise ValueError(f"--hidden: got {hidden}; expected a multiple of {head_dim}, a head")
        shared = case.heads // case.kv_heads
        kv_heads = heads // shared if heads % shared == 0 else heads
        mlp = max(case.mlp * hidden // case.hidden, 1)
        changes |= {"hidden": hidden, "heads": heads, "kv_heads": kv_heads, "mlp": mlp}
    return replace(case, **changes)


def case_of(checkpoint: str) -> Case:
    """The sizes of a checkpoint, by its config; all of it trains.

    Raises:
        ValueError: it cannot be read, or is of another family.
    """
    try:
        config: Any = AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model: got {checkpoint!r}, which cannot be read ({error}); expected "
            f"{', '.join(RANDOM)}, or folder or hub name of a checkpoint"
        ) from error
    if config.model_type != FAMILY:
        raise ValueError(
            f"--model: got {checkpoint!r}, a model of type {config.model_type!r}; expected one of "
            f"type {FAMILY!r} (Llama-3.2-Vision)"
        )
    text, vision = config.get_text_config(), config.vision_config
    cross = len(text.cross_attention_layers)
    return Case(
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        cross_layers=cross,
        self_layers=text.num_hidden_layers - cross,
        mlp=text.intermediate_size,
        vocabulary=min(text.vocab_size, config.image_token_index),
        vision_hidden=vision.hidden_size,
        vision_heads=vision.attention_heads,
        vision_mlp=vision.intermediate_size,
        vision_layers=vision.num_hidden_layers,
        vision_global_layers=vision.num_global_layers,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        tiles=vision.max_num_tiles,
        trains="all",
        features="tower",
    )


def build_model(
    case: Case,
    *,
    checkpoint: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> MllamaForConditionalGeneration:
    """The model on the CPU; only what the case trains wants gradients.

    Args:
        case: its sizes.
        checkpoint: of its weights; None draws them, with open gates.
        dtype: of its weights.
        seed: of random weights, which are drawn in bf16.
    """
    model: Any
    if checkpoint is not None:
        model = MllamaForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
    else:
        torch.manual_seed(seed)
        with _default_dtype(torch.bfloat16):
            model = MllamaForConditionalGeneration(config_of(case))
        model = model.to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_trains(name, case))
        if checkpoint is None and name.endswith("_gate"):
            # Shut, as in a new model, the gradients of K and V would be zeros.
            torch.nn.init.constant_(parameter, 1.0)
    found: MllamaForConditionalGeneration = model
    return found


def config_of(case: Case) -> MllamaConfig:
    """The config of the model."""
    text = MllamaTextConfig(
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
    # As in the model itself, the features are the last output beside those of five layers, or of
    # all, where there are fewer.
    taken = list(range(case.vision_layers))[-5:]
    vision = MllamaVisionConfig(
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
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=case.vocabulary)


def _trains(name: str, case: Case) -> bool:
    if "vision_model" in name:
        return case.features == "tower"
    if "multi_modal_projector" in name:
        return case.features != "frozen"
    if case.trains != "kv":
        return case.trains == "all" or any(
            part in name
            for part in ("cross_attn", *(f"layers.{layer}." for layer in range(case.cross_layers)))
        )
    return "cross_attn" in name and any(part in name for part in _KEYS_AND_VALUES)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_batch(
    case: Case,
    *,
    frames: range,
    total: int,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> dict[str, Tensor]:
    """One sample of random text and frames; every token sees all frames.

    Args:
        case: sizes.
        frames: those that are there, this rank's; a frame is the same whoever makes it.
        total: of the sample.
        dtype: of the pixels.
        seed: of text and frames.

    Returns:
        A batch for ``ds_lvx.shard_batch(..., frames="local")``.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (1, case.text_tokens)
    tokens = torch.randint(1, case.vocabulary, shape, generator=generator)
    pixels = torch.empty(
        1, len(frames), case.tiles, 3, case.image_size, case.image_size, dtype=dtype
    )
    for place, frame in enumerate(frames):
        generator.manual_seed(seed + 1 + frame)
        # Brighter or darker than others, so that a method which lost some would show.
        shift = torch.randn(3, 1, 1, generator=generator)
        pixels[0, place] = shift + torch.randn(pixels.shape[2:], generator=generator)
    return {
        "input_ids": tokens,
        "labels": tokens,
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.full((1, len(frames)), case.tiles),
        "aspect_ratio_mask": torch.ones(1, len(frames), case.tiles, dtype=torch.long),
        "visible_images": torch.tensor([0, total]).expand(*shape, 2),
    }


def ds_config(
    setting: Setting,
    case: Case,
    *,
    ranks: int,
    schedule: str | None = None,
    dtype: str = "bfloat16",
    zero_stage: int = 2,
    text_method: str = "ulysses",
) -> dict[str, Any]:
    """The ds_config that trains a case on ``ranks`` ranks that share one sample.

    Args:
        setting: of the cross-attention.
        case: what is trained.
        ranks: all of the job.
        schedule: of lvx; None is the default.
        dtype: ``"bfloat16"`` or ``"float32"``.
        zero_stage: of DeepSpeed.
        text_method: of the text's own attention.
    """
    rule = {"match": "*.cross_attn", **setting.rule()}
    if schedule is not None:
        rule["schedule"] = schedule
    rules: list[dict[str, Any]] = [{"match": "*vision_model*", "method": "none"}, rule]
    if case.self_layers > 0 and ranks > 1:
        rules.append({"match": "*language_model*.self_attn", "method": text_method})
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": zero_stage},
        "ds_lvx": {"sequence_parallel_size": ranks, "layers": rules},
    }
    if zero_stage in (1, 2):
        buckets = ("reduce_bucket_size", "allgather_bucket_size")
        config["zero_optimization"] |= dict.fromkeys(buckets, _BUCKET_ELEMENTS)
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
    if setting.checkpointing:
        config["activation_checkpointing"] = {}
    LVXConfig.from_ds_config(config)
    return config
