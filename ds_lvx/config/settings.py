"""Values of a ds_config that nobody fills in, or that are of the wrong kind, each by its key.

DeepSpeed reads most keys as they are: `"auto"`, which Hugging Face's Trainer replaces, and a number
in quotes fail where they are first computed with, after minutes of loading, or mean something else.
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import logger
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ds_lvx.config.words import key_path, shown

# Where the word is a choice of ours, a name of the user's, or one that DeepSpeed understands.
_AUTO_IS_A_CHOICE = ("ds_lvx", "tensorboard", "wandb", "csv_monitor", "comet", "autotuning")
_AUTO_OF_DEEPSPEED = ("data_types.keep_in_fp32_modules",)
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "model_type": "an object",
    "list_type": "an array",
    "missing": "one more key, this one; add it",
    "finite_number": "a finite number",
    "greater_than_equal": "{ge} or more",
}

Count = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Kinds(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Precision(_Kinds):
    enabled: bool = False


class _Parameters(_Kinds):
    """Of an optimizer or of a scheduler; what has another name is left to its constructor."""

    lr: Positive | None = None
    eps: Positive | None = None
    weight_decay: Number | None = None
    momentum: Number | None = None
    betas: list[Number] | None = None
    warmup_min_lr: Positive | None = None
    warmup_max_lr: Positive | None = None
    warmup_num_steps: int | None = None
    total_num_steps: int | None = None
    warmup_min_ratio: Number | None = None
    cos_min_ratio: Number | None = None


class _TensorParallel(_Kinds):
    autotp_size: int = 0


class _Named(_Kinds):
    type: str
    params: _Parameters = _Parameters()


class _Settings(_Kinds):
    """The keys of the top level that DeepSpeed takes unchecked, and of its sections without one."""

    train_batch_size: Count | None = None
    train_micro_batch_size_per_gpu: Count | None = None
    gradient_accumulation_steps: Count | None = None
    gradient_clipping: Positive = 0.0
    gradient_predivide_factor: Number = 1.0
    prescale_gradients: bool = False
    steps_per_print: float | None = None
    dump_state: bool = False
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    disable_allgather: bool = False
    dataloader_drop_last: bool = False
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    communication_data_type: str | None = None
    seq_parallel_communication_data_type: str = ""
    bf16: _Precision = _Precision()
    bfloat16: _Precision = _Precision()
    fp16: _Precision = _Precision()
    optimizer: _Named | None = None
    scheduler: _Named | None = None
    tensor_parallel: _TensorParallel = _TensorParallel()


def check_values(ds_config: Mapping[str, Any]) -> None:
    """Refuse an `"auto"` that nobody fills in, and values of the wrong kind.

    Args:
        ds_config: the whole config.

    Raises:
        ValueError: names each such key, with what was got and what is expected.
    """
    problems = [
        f'{path}: got "auto", which nobody fills in here (Hugging Face\'s Trainer does); expected '
        "a value; write one, or take the key out for DeepSpeed's default"
        for path in _autos(ds_config, ())
    ]
    try:
        _Settings.model_validate(dict(ds_config))
    except ValidationError as error:
        problems += [
            f"{key_path(details['loc'])}: got {shown(details['input'])}; expected "
            + _EXPECTED.get(details["type"], details["msg"]).format(**details.get("ctx", {}))
            for details in error.errors()
            if details["input"] != "auto"
        ]
    if problems:
        raise ValueError("\n".join(problems))


def ask_deepspeed(ds_config: Mapping[str, Any]) -> None:
    """Let DeepSpeed read the whole config as it will when the engine is made.

    Args:
        ds_config: the whole config, of which batch sizes are left out: they depend on the ranks.

    Raises:
        ValueError: DeepSpeed does not take it.
    """
    config = {**copy.deepcopy(dict(ds_config)), "train_micro_batch_size_per_gpu": 1}
    for key in ("train_batch_size", "gradient_accumulation_steps", "sequence_parallel_size"):
        config.pop(key, None)
    level = logger.level
    logger.setLevel(logging.ERROR)  # it says all this again when the engine is made
    try:
        DeepSpeedConfig(config)
    except ValidationError as error:
        lines = (
            f"ds_config: {error.title}: {key_path(details['loc'])}: got {shown(details['input'])}; "
            f"DeepSpeed says: {details['msg']}; correct the key"
            for details in error.errors()
        )
        raise ValueError("\n".join(lines)) from None
    # Of whatever kind: sections fail with assertions, KeyErrors and AttributeErrors too.
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"ds_config: DeepSpeed refuses it ({said}); correct the key") from error
    finally:
        logger.setLevel(level)


def _autos(value: Any, loc: tuple[str | int, ...]) -> Iterator[str]:
    if value == "auto" and key_path(loc) not in _AUTO_OF_DEEPSPEED:
        yield key_path(loc)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if loc or key not in _AUTO_IS_A_CHOICE:
                yield from _autos(inner, (*loc, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _autos(inner, (*loc, index))
