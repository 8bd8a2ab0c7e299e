"""Models whose code comes with their checkpoints, and what is read of any checkpoint's files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.hub import cached_file

from ds_lvx.models.registry import FAMILIES

SETTINGS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
"""Files that say how pictures are made, in either of the forms that transformers writes."""
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template, where a checkpoint brings no template of its own."""


def load(
    name: str, dtype: torch.dtype, *, trust_remote_code: bool, advice: str, **more: Any
) -> Any:
    """The model of a checkpoint, from a folder or the hub.

    Args:
        name: of the folder, or on the hub.
        dtype: of the weights.
        trust_remote_code: its code may run.
        advice: for code that is written for another transformers, of which files and what to do.
        more: for ``from_pretrained``.

    Raises:
        ValueError: it may not run, or does not.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=trust_remote_code, **more
        )
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"got {name}, whose own code does not run on transformers {transformers.__version__} "
            f"({type(error).__name__}: {error}); expected code written for transformers 5: {advice}"
        ) from error
    for module in model.modules():
        if isinstance(getattr(module, "_tied_weights_keys", None), list):
            # transformers 5 saves by a dict; no weights are tied.
            module._tied_weights_keys = cast(Any, {})
    return model


def restore_buffers(model: Any) -> None:
    """Compute the buffers again that no checkpoint holds, such as tables of positions.

    transformers 5 leaves them uninitialised in a loaded model, but for classes that ask it not to.

    Args:
        model: of a class that a configuration is enough for.
    """
    weights = register_module_parameter_registration_hook(cast(Any, _without_memory))
    try:
        fresh = type(model)(copy.deepcopy(model.config))
    finally:
        weights.remove()
    _copy_buffers(fresh, model)


def _without_memory(module: nn.Module, name: str, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False)


def _copy_buffers(fresh: nn.Module, model: nn.Module) -> None:
    modules = dict(model.named_modules())
    for name, source in fresh.named_modules():
        for key in source._non_persistent_buffers_set:
            buffer, there = source._buffers[key], modules[name]._buffers.get(key)
            if buffer is not None:
                device = buffer.device if there is None else there.device
                modules[name]._buffers[key] = buffer.to(device)


def read_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """A checkpoint's configuration, from a folder or the hub.

    Args:
        name: of the folder, or on the hub.
        trust_remote_code: code that comes with the checkpoint may run.

    Raises:
        OSError, ValueError: it cannot be read, or is of a type that nobody knows.
    """
    try:
        found = read_json(name, "config.json")
    except ValueError:
        found = None  # transformers says better what is wrong
    kind = str(found.get("model_type")) if isinstance(found, dict) else ""
    own = FAMILIES.named(kind).config_class() if kind in FAMILIES else None
    if own is not None:
        return own.from_pretrained(name)
    return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def read_json(name: str, file: str) -> Any:
    """A file of a checkpoint, from a folder or the hub; empty where there is none."""
    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return {} if found is None else json.loads(Path(found).read_text())


def read_settings(name: str, *more: str) -> dict[str, Any]:
    """How a checkpoint makes pictures, by the name of each file; empty where there is none.

    Args:
        name: of the folder, or on the hub.
        more: other files to read along.

    Raises:
        ValueError: none of them says it; defaults would be another model's.
    """
    files = {file: read_json(name, file) for file in (*SETTINGS, *more)}
    images, _, both = (files[file] for file in SETTINGS)
    if not (images or both.get("image_processor") or both.get("video_processor")):
        raise ValueError(
            f"got {name}, of whose pictures neither {SETTINGS[0]} nor {SETTINGS[2]} says how they "
            "are made; expected one of these files: copy it from the repository of the model"
        )
    return files


def read_section(name: str, section: str) -> Any:
    """A section of a checkpoint's ``config.json``.

    Raises:
        ValueError: there is none.
    """
    found = read_json(name, "config.json").get(section)
    if not isinstance(found, dict):
        raise ValueError(
            f"got {name}, whose config.json has no section {section!r}; expected the folder or the "
            "name of a checkpoint of this family"
        )
    return found
