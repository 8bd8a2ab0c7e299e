"""A fine-tuning job that is the same for every method: model, weights, batch, and its ds_config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ds_lvx.compare.case import Case, build_model
from ds_lvx.config import LVXConfig

LLAMA = Case(
    cross_layers=8,
    self_layers=32,
    mlp=14336,
    vocabulary=128256,
    vision_hidden=1280,
    vision_heads=16,
    vision_mlp=5120,
    vision_layers=32,
    vision_global_layers=8,
    image_size=560,
    patch_size=14,
    tiles=4,
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
)
"""A model of some nine million weights, with heads of a real size and 257 visual tokens a frame."""

RANDOM: Mapping[str, Case] = {"tiny": TINY, "mllama": LLAMA}
"""Models with random weights, by name; any other name is that of a checkpoint."""

METHODS: Mapping[str, Mapping[str, Any]] = {
    "lvx-gather": {"method": "lvx", "schedule": "gather"},
    "lvx-ring": {"method": "lvx", "schedule": "ring"},
    "lvx-auto": {"method": "lvx", "schedule": "auto"},
    "ulysses": {"method": "ulysses"},
    "ring": {"method": "ring"},
    "none": {"method": "none"},
}
"""Keys of the rule for the cross-attention; ``none`` runs on one process."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BUCKET_ELEMENTS = 2**23


@dataclass(frozen=True)
class Job:
    """What is trained. Sizes are those of the whole sample, over all ranks.

    Attributes:
        model: a key of `RANDOM`, or folder or hub name of a mllama checkpoint.
        case: dimensions, where weights are random; None for a checkpoint.
        frames: of the one sample.
        text_tokens: of the one sample.
        dtype: a key of `DTYPES`.
        zero_stage: of DeepSpeed.
        text_method: of the text's own attention, ``"ulysses"`` or ``"ring"``.
        recompute: lvx projects K and V again in backward.
        checkpointing: of the layers.
        freeze_vision: the vision tower does not train.
        seed: of weights and batch.
    """

    model: str
    case: Case | None
    frames: int
    text_tokens: int
    dtype: str = "float32"
    zero_stage: int = 2
    text_method: str = "ulysses"
    recompute: bool = True
    checkpointing: bool = False
    freeze_vision: bool = False
    seed: int = 0

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Job:
        """From JSON."""
        case = record["case"]
        return cls(**{**record, "case": None if case is None else Case(**case)})


def cut(
    case: Case,
    *,
    hidden: int | None = None,
    cross_layers: int | None = None,
    self_layers: int | None = None,
    vision_layers: int | None = None,
) -> Case:
    """A model of fewer or narrower layers; None leaves a size as it is.

    The size of a head stays, and how many query heads share one of K and V.

    Raises:
        ValueError: a ``hidden`` that is no multiple of the size of a head, or no layers.
    """
    changes: dict[str, Any] = {}
    if hidden is not None:
        head_dim = case.hidden // case.heads
        heads, rest = divmod(hidden, head_dim)
        if rest or heads < 1:
            raise ValueError(f"--hidden: got {hidden}; expected a multiple of {head_dim}, a head")
        shared = case.heads // case.kv_heads
        kv_heads = heads // shared if heads % shared == 0 else heads
        mlp = max(case.mlp * hidden // case.hidden, 1)
        changes |= {"hidden": hidden, "heads": heads, "kv_heads": kv_heads, "mlp": mlp}
    least = {"cross_layers": 1, "self_layers": 0, "vision_layers": 1}
    given = {
        "cross_layers": cross_layers,
        "self_layers": self_layers,
        "vision_layers": vision_layers,
    }
    for name, value in given.items():
        if value is None:
            continue
        if value < least[name]:
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: got {value}; expected at least {least[name]}")
        changes[name] = value
    if vision_layers is not None:
        changes["vision_global_layers"] = min(case.vision_global_layers, vision_layers)
    return replace(case, **changes)


def build(job: Job) -> nn.Module:
    """The model on the CPU, all of it trained, but for a frozen vision tower.

    Raises:
        ValueError: a checkpoint that cannot be read, or of another kind.
    """
    dtype = DTYPES[job.dtype]
    model: nn.Module
    if job.case is None:
        model = _checkpoint(job.model, dtype)
    else:
        torch.manual_seed(job.seed)
        built: Any = build_model(job.case)
        model = built.to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (job.freeze_vision and "vision_model" in name))
    return model


def _checkpoint(name: str, dtype: torch.dtype) -> nn.Module:
    from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration

    check_checkpoint(name)
    model: nn.Module = MllamaForConditionalGeneration.from_pretrained(name, dtype=dtype)
    return model


def check_checkpoint(name: str) -> Any:
    """The config of a checkpoint.

    Raises:
        ValueError: it cannot be read, or is of another kind than mllama.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model: got {name!r}, which cannot be read ({error}); expected {', '.join(RANDOM)}, "
            "or folder or hub name of a checkpoint"
        ) from error
    if config.model_type != "mllama":
        raise ValueError(
            f"--model: got {name!r}, a model of type {config.model_type!r}; expected one of type "
            "'mllama' (Llama-3.2-Vision)"
        )
    return config


def text_heads(job: Job) -> int:
    """Query heads of the text model; reads the config of a checkpoint."""
    if job.case is not None:
        return job.case.heads
    return int(check_checkpoint(job.model).get_text_config().num_attention_heads)


def make_batch(job: Job, config: Any, *, frames: range) -> dict[str, Tensor]:
    """One sample of random text and frames, of which these are there; every token sees all.

    Args:
        job: sizes and seed.
        config: of the model.
        frames: this rank's, of ``job.frames``; a frame is the same whoever makes it.

    Returns:
        A batch for ``ds_lvx.shard_batch(..., frames="local")``.
    """
    text, vision = config.get_text_config(), config.vision_config
    generator = torch.Generator().manual_seed(job.seed)
    highest = min(text.vocab_size, config.image_token_index)
    tokens = torch.randint(1, highest, (1, job.text_tokens), generator=generator)
    tiles, size = vision.max_num_tiles, vision.image_size
    pixels = torch.empty(1, len(frames), tiles, 3, size, size)
    for place, frame in enumerate(frames):
        generator.manual_seed(job.seed + 1 + frame)
        # Brighter or darker than others, so that a method which lost some would show.
        shift = torch.randn(3, 1, 1, generator=generator)
        pixels[0, place] = shift + torch.randn(pixels.shape[2:], generator=generator)
    ratios = [height * width for height, width in vision.supported_aspect_ratios]
    return {
        "input_ids": tokens,
        "labels": tokens,
        "pixel_values": pixels.to(DTYPES[job.dtype]),
        "aspect_ratio_ids": torch.full((1, len(frames)), 1 + ratios.index(tiles)),
        "aspect_ratio_mask": torch.ones(1, len(frames), tiles, dtype=torch.long),
        "visible_images": torch.tensor([0, job.frames]).expand(1, job.text_tokens, 2),
    }


def ds_config(job: Job, method: str, *, ranks: int) -> dict[str, Any]:
    """The ds_config of the job by one of `METHODS`, on ``ranks`` ranks that share the sample."""
    rule = {"match": "*.cross_attn", **METHODS[method]}
    if job.recompute and rule["method"] == "lvx":
        rule["recompute_kv"] = True
    rules: list[dict[str, Any]] = [{"match": "*vision_model*", "method": "none"}, rule]
    if ranks > 1:
        rules.append({"match": "*language_model*.self_attn", "method": job.text_method})
    if job.case is not None and job.case.self_layers == 0:
        rules = rules[:2]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": job.zero_stage},
        "ds_lvx": {"sequence_parallel_size": ranks, "layers": rules},
    }
    if job.zero_stage in (1, 2):
        buckets = ("reduce_bucket_size", "allgather_bucket_size")
        config["zero_optimization"] |= dict.fromkeys(buckets, _BUCKET_ELEMENTS)
    if job.dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
    if job.checkpointing:
        config["activation_checkpointing"] = {}
    LVXConfig.from_ds_config(config)
    return config


def sizes(job: Job, config: Any) -> dict[str, int]:
    """Visual and text tokens of the whole sample, and what a frame has."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    of_frame = vision.max_num_tiles * patches
    return {
        "visual_tokens": job.frames * of_frame,
        "text_tokens": job.text_tokens,
        "visual_tokens_of_a_frame": of_frame,
    }
