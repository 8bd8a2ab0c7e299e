"""What a model computes in, also where its weights are packed: bitsandbytes' in 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ds_lvx.config.words import shown


def training_dtype(ds_config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the weights that DeepSpeed computes with.

    Raises:
        ValueError: the section that says so is none.
    """
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        section = ds_config.get(key, {})
        if not isinstance(section, Mapping):
            raise ValueError(
                f'{key}: got {shown(section)}; expected an object such as {{"enabled": true}}'
            )
        if section.get("enabled", False):
            return dtype
    return torch.float32


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is one of bitsandbytes, whose dtype and shape are not those of the layer."""
    return _in_4bit(weight) or hasattr(weight, "SCB")


def _in_4bit(weight: Tensor) -> bool:
    return hasattr(weight, "quant_state")


def dtype_of(model: nn.Module) -> torch.dtype:
    """What a model computes in: the dtype of the first weight that is not packed."""
    return next(weight.dtype for weight in model.parameters() if not is_packed(weight))


def share_in_4bit(model: nn.Module) -> float:
    """Of all weights of a model those in 4 bits, from 0 to 1."""
    weights = list(model.parameters())
    packed = [weight for weight in weights if _in_4bit(weight)]
    found = sum(weight.quant_state.shape.numel() for weight in packed)  # type: ignore[attr-defined]
    return found / (found + sum(w.numel() for w in weights if not _in_4bit(w)))


def keep_layout(model: nn.Module) -> None:
    """Let layers in 4 bits stay as training needs them, also where the model is evaluated.

    On a CPU with AVX512-BF16 bitsandbytes 0.50 lays weights out anew in the first evaluation, and
    where training goes on, no gradient comes through them.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_packed(model: nn.Module, ds_config: Mapping[str, Any]) -> None:
    """Refuse weights in 4 bits that DeepSpeed would convert number by number, or that do not train.

    Args:
        model: may have none.
        ds_config: the whole config; its dtype counts.

    Raises:
        ValueError: they are stored as floats of another dtype, or were laid out for evaluation
            (`keep_layout`); names the first.
    """
    for name, weight in model.named_parameters():
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"got {name} in 4 bits as bitsandbytes lays it out to evaluate on this CPU, where "
                "no gradient comes through; expected it as it was read: load the model again, and "
                "call ds_lvx.initialize before it is evaluated"
            )
    dtype = training_dtype(ds_config)
    if dtype == torch.float32:  # nothing is converted
        return
    for name, weight in model.named_parameters():
        if _in_4bit(weight) and weight.is_floating_point() and weight.dtype != dtype:
            raise ValueError(
                f"got {name} in 4 bits, stored as {weight.dtype}, for a ds_config of {dtype}, to "
                "which DeepSpeed would convert what is no number; expected torch.uint8 or "
                f"{dtype}: load the model with this bnb_4bit_quant_storage"
            )
