"""Hooks that make every forward of a model one of a generation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ds_lvx.models.generating.decoding import Decoding
from ds_lvx.models.patch import Hook


class _Begin(Hook):
    """A forward pre-hook of the model, the first: what a forward of generation needs."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding

    def __call__(
        self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, **self._decoding.begin(kwargs)}


class _End(Hook):
    """A forward hook of the model."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding

    def __call__(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        self._decoding.end_forward(kwargs.get("past_key_values"), output)
        return output


@contextmanager
def feeding(model: nn.Module, decoding: Decoding) -> Iterator[None]:
    """Let every forward of the model be one of this generation.

    Args:
        model: that generates; it is called with keywords.
        decoding: the state.
    """
    # First, so that the family's own hooks find the keyword.
    begin = model.register_forward_pre_hook(_Begin(decoding), with_kwargs=True, prepend=True)
    end = model.register_forward_hook(_End(decoding), with_kwargs=True)
    try:
        yield
    finally:
        begin.remove()
        end.remove()
        decoding.release()
