"""A base in 4 bits for LoRA to train on (QLoRA): NF4 of bitsandbytes, constants quantized as well.

transformers quantizes weight after weight as it reads them. The vision tower, what leads from it to
the text, and the head stay as they are, and so does what is no linear layer. Source: QLoRA (arXiv
2305.14314), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from ds_lvx.data.extras import need
from ds_lvx.models.contract import Family

OPTION = "--load_in_4bit"
EXTRA = "quantization"
HEADS = ("lm_head", "embed_out")
"""Names of heads in transformers' models; a head of a class of its own is never quantized."""


def check(options: Any, config: Any) -> None:
    """See that what quantizes is installed.

    Args:
        options: ``load_in_4bit``, ``model``.
        config: of the model, which says whether its checkpoint is quantized already.

    Raises:
        ValueError: a package is missing; says how to install it.
    """
    given = getattr(config, "quantization_config", None)
    method = given.get("quant_method") if isinstance(given, dict) else None
    if options.load_in_4bit or method == "bitsandbytes":
        for package in ("bitsandbytes", "accelerate"):  # transformers wants both
            need(package, EXTRA, why=OPTION if options.load_in_4bit else options.model)


def words(family: Family, dtype: torch.dtype) -> dict[str, Any]:
    """What makes transformers' ``from_pretrained`` quantize.

    Args:
        family: of the model.
        dtype: to compute in.
    """
    from transformers import BitsAndBytesConfig

    regions = family.regions() if family.has("regions") else {}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*HEADS, *(n for n, part in regions.items() if part == "vision")],
    )
    # Without a device it takes the first of CUDA, whatever DeepSpeed's accelerator is.
    device = get_accelerator().current_device_name()
    return {"quantization_config": config, "device_map": {"": device}}


def read_again(model: Any, dtype: torch.dtype, how: dict[str, Any]) -> Any:
    """A model of random weights as a checkpoint of it would be read with `words`."""
    found = type(model).from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), dtype=dtype, **how
    )
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            found.get_parameter(name).requires_grad_(False)
    settle(found, dtype)
    return found


def settle(model: nn.Module, dtype: torch.dtype) -> None:
    """Let layers in 4 bits compute in a dtype, whatever their checkpoint says."""
    module: Any
    for module in model.modules():
        if getattr(module, "quant_state", None) is not None:
            module.compute_dtype, module.compute_type_is_set = dtype, True
