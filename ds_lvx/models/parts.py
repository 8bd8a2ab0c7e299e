"""Models put together from several files, of which one holds what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def read_weights(option: str, file: Path, *, inside: str, expected: str) -> dict[str, Tensor]:
    """The weights of a file that torch wrote, on the CPU.

    Args:
        option: by which the file was given.
        file: where it is.
        inside: the key under which they lie, if they do not lie at the top.
        expected: which file it should be.

    Raises:
        ValueError: it cannot be read, or holds no weights.
    """
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{option}: got {file}, which cannot be read ({error}); expected {expected}"
        ) from error
    found = found.get(inside, found) if isinstance(found, Mapping) else {}
    weights = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if not weights:
        raise ValueError(f"{option}: got {file}, which holds no weights; expected {expected}")
    return weights


def load_parts(model: nn.Module, found: Mapping[str, Tensor], *, complaint: str) -> None:
    """Load a model whose weights were found in several files, all of them.

    Args:
        model: the model.
        found: its weights, by name.
        complaint: what was got, for an error, and ``{}`` where it says which weights do not fit.

    Raises:
        ValueError: some are missing, left over, or of another shape; names the first.
    """
    wanted = model.state_dict()
    others = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    others += [f"{name} is left over" for name in found.keys() - wanted.keys()]
    others += [
        f"{name} is {tuple(found[name].shape)}, not {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    if others:
        raise ValueError(complaint.format(f"{len(others)} weights, of which {min(others)}"))
    model.load_state_dict(found)
