"""The model to train, its processor, and what of it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration

from ds_lvx.config import zero_stage
from ds_lvx.training.options import Options
from ds_lvx.training.tiny import MAX_POSITIONS, tiny_config, tiny_processor

TINY = "tiny"
TINY_GATE = 0.5
# The text model's attention projections; the vision tower's have other names around them.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"


def load_processor(name: str) -> Any:
    """The processor of a checkpoint, or of the tiny model.

    Raises:
        ValueError: there is no such checkpoint, or it is of another kind than mllama.
    """
    if name == TINY:
        return tiny_processor()
    with _readable(name):
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "mllama":
            raise ValueError(
                f"got {name}, a model of type {config.model_type!r}; expected one of type 'mllama' "
                "(Llama-3.2-Vision); take such a checkpoint"
            )
        return AutoProcessor.from_pretrained(name)


def max_positions(name: str, max_length: int | None) -> int:
    """Text tokens that a sample may have: the option, or all positions of the model.

    Raises:
        ValueError: the option asks for more than the model has.
    """
    positions = MAX_POSITIONS
    if name != TINY:
        text = AutoConfig.from_pretrained(name).get_text_config()
        positions = int(text.max_position_embeddings)
    if max_length is not None and max_length > positions:
        raise ValueError(
            f"--max_length: got {max_length}; expected at most {positions}, the positions of "
            f"{name}; lower it"
        )
    return positions if max_length is None else max_length


def training_dtype(ds_config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the weights that DeepSpeed computes with."""
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if ds_config.get(key, {}).get("enabled", False):
            return dtype
    return torch.float32


def load_model(options: Options, ds_config: Mapping[str, Any], processor: Any) -> nn.Module:
    """The model, with what trains chosen; under ZeRO-3 no rank ever holds the whole of it.

    Args:
        options: ``model``, ``seed``, ``lora_*``, ``freeze_vision``, ``gradient_checkpointing``.
        ds_config: the whole config: dtype and ZeRO stage count here.
        processor: of the same checkpoint.

    Raises:
        ValueError: the checkpoint cannot be read.

    Collectives: under ZeRO-3, broadcasts of the weights from rank 0, over all ranks.
    """
    dtype = training_dtype(ds_config)
    torch.manual_seed(options.seed)
    with _partitioned(ds_config, dtype):
        if options.model == TINY:
            model: Any = _tiny_model(processor, dtype)
        else:
            with _readable(options.model):
                model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=dtype)
    if options.freeze_vision:
        model.model.vision_model.requires_grad_(False)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return _with_lora(model, options) if options.lora_r > 0 else model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What trains, in two groups: matrices decay, norms, biases and gates do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    # A parameter that ZeRO-3 has taken apart keeps its shape in ds_shape.
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
    others = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = ((matrices, weight_decay), (others, 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def _tiny_model(processor: Any, dtype: torch.dtype) -> nn.Module:
    config = tiny_config(processor.image_token_id)
    model = MllamaForConditionalGeneration._from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("_attn_gate"):
            # At 0, as checkpoints of the real size start, nothing visual has any effect at first.
            _fill(parameter, TINY_GATE)
    return model


def _fill(parameter: nn.Parameter, value: float) -> None:
    import deepspeed

    partitioned = hasattr(parameter, "ds_id")
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=partitioned):
        nn.init.constant_(parameter, value)


def _with_lora(model: nn.Module, options: Options) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha or 2 * options.lora_r,
        lora_dropout=options.lora_dropout,
        target_modules=LORA_TARGETS,
    )
    # Loading draws random numbers, and how many depends on the ZeRO stage.
    torch.manual_seed(options.seed)
    return get_peft_model(model, config)


@contextmanager
def _partitioned(ds_config: Mapping[str, Any], dtype: torch.dtype) -> Iterator[None]:
    """Under ZeRO-3, let transformers take each weight apart as soon as it is there."""
    if zero_stage(ds_config) != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    # Only what concerns the weights: DeepSpeed would check the batch sizes against a world in
    # which it knows of no sequence-parallel group.
    keys = [key for key in ("zero_optimization", "bf16", "fp16") if key in ds_config]
    config = {key: ds_config[key] for key in keys} | {"train_micro_batch_size_per_gpu": 1}
    # transformers holds only a weak reference: it must live as long as the loading.
    alive = HfDeepSpeedConfig(config)
    try:
        yield
    finally:
        del alive


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"--model: got {name!r}, which cannot be read ({error}); expected a folder or the hub "
            "name of a checkpoint, or `tiny`; check the name, and the login for a gated one"
        ) from error
