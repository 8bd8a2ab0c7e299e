"""Loading MOSS-VL, whose code comes with its checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ds_lvx.models import remote

_FREQUENCIES = "inv_freq"
_VISION_THETA = 1e4
_ADVICE = (
    "the files of most MOSS-VL checkpoints are for 4.57.1; take the modeling and configuration "
    "files of a release for transformers 5"
)


def load(name: str, dtype: torch.dtype, *, trust_remote_code: bool, **more: Any) -> Any:
    """The model of a checkpoint, from a folder or the hub.

    Args:
        name: of the folder, or on the hub.
        dtype: of the weights.
        trust_remote_code: its code may run.
        more: for ``from_pretrained``.

    Raises:
        ValueError: it may not, or is written for another transformers.
    """
    model = remote.load(name, dtype, trust_remote_code=trust_remote_code, advice=_ADVICE, **more)
    restore_frequencies(model)
    return model


def restore_frequencies(model: Any) -> None:
    """Compute the rotary embeddings' frequencies again, which transformers 5 leaves uninitialised.

    They are in no checkpoint, and transformers initialises such buffers only in classes that ask it
    to; the model's own do not.
    """
    text = model.config.text_config
    rope = getattr(text, "rope_parameters", None) or {}
    theta = rope.get("rope_theta", getattr(text, "rope_theta", None))
    if theta is not None and rope.get("rope_type", "default") == "default":
        _restore(model.model.language_model.rotary_emb, float(theta))
    _restore(model.model.visual.rotary_pos_emb, _VISION_THETA)


def _restore(module: nn.Module, theta: float) -> None:
    found = getattr(module, _FREQUENCIES, None)
    if not isinstance(found, torch.Tensor):
        return
    exponents = torch.arange(len(found), dtype=torch.float32) / len(found)
    frequencies = (1.0 / theta**exponents).to(found.device)
    setattr(module, _FREQUENCIES, frequencies)
    if hasattr(module, f"original_{_FREQUENCIES}"):
        setattr(module, f"original_{_FREQUENCIES}", frequencies)
