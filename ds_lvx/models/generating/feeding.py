"""Hooks that make every forward of a model one of a generation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import Tensor, nn

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


class _Wanted(Hook):
    """A forward pre-hook of what makes the logits, of a model whose forward has no
    ``logits_to_keep``: only those that are asked for."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        wanted = self._decoding.wanted
        return None if wanted is None else (args[0].index_select(1, wanted), *args[1:])


_COUNTS = "_get_image_nums_and_video_nums"
"""By which models of transformers 5.17 find the images that each beam of a sample gets; later ones
have none. VideoLLaMA 3's refuses a text whose pixels it has not."""


def _no_media(input_ids: Tensor, **unused: Any) -> tuple[list[int], list[int]]:
    """Images and videos of each row that are arguments of the model's: ranks have them."""
    return [0] * len(input_ids), [0] * len(input_ids)


@contextmanager
def feeding(model: nn.Module, decoding: Decoding) -> Iterator[None]:
    """Let every forward of the model be one of this generation.

    Args:
        model: that generates; it is called with keywords.
        decoding: the state.
    """
    # First, so that the family's own hooks find the keyword.
    hooks = [
        model.register_forward_pre_hook(_Begin(decoding), with_kwargs=True, prepend=True),
        model.register_forward_hook(_End(decoding), with_kwargs=True),
    ]
    if decoding.is_dealt and "logits_to_keep" not in signature(type(model).forward).parameters:
        out: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        hooks.append(out.register_forward_pre_hook(_Wanted(decoding)))
    counts = decoding.is_dealt and hasattr(model, _COUNTS)
    if counts:
        setattr(model, _COUNTS, _no_media)
    try:
        yield
    finally:
        if counts:
            delattr(model, _COUNTS)
        for hook in hooks:
            hook.remove()
        decoding.release()
