"""A processor that makes equal samples once: completions of one prompt have the same images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

_OF_TOKENS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


def processing_once(processor: Any, copies: int) -> Any:
    """The same processor, which makes samples once that are equal.

    Args:
        processor: of transformers.
        copies: samples in a row that may be equal.

    Returns:
        An object of the processor's class. Called with lists of ``images`` and ``text`` and
        ``return_tensors="pt"`` it returns what the processor does, made of a sample for each
        ``copies``; where samples differ, or theirs do not fit together, it calls the processor.
    """
    kind = type(processor)

    def call(self: Any, *args: Any, **given: Any) -> Any:
        own = partial(kind.__call__, self)
        found = None if args or copies == 1 else _made_once(own, copies, **given)
        return own(*args, **given) if found is None else found

    made = copy.copy(processor)
    made.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return made


def alike(one: Any, other: Any) -> bool:
    """Whether two values, such as prompts with their images, are equal for certain."""
    try:
        return bool(one == other)
    except (ValueError, RuntimeError):  # images as arrays, which tell element by element
        return False


def _made_once(
    own: Callable[..., Mapping[str, Any]],
    copies: int,
    *,
    images: Any = None,
    text: Any = None,
    **options: Any,
) -> BatchFeature | None:
    """See `processing_once`; None where the processor has to be called for all."""
    lists = isinstance(text, list) and isinstance(images, list) and len(text) == len(images)
    if not lists or len(text) % copies or options.get("return_tensors") != "pt":
        return None
    samples = list(zip(images, text, strict=True))
    firsts = samples[::copies]
    if not all(alike(sample, firsts[n // copies]) for n, sample in enumerate(samples)):
        return None
    made = [own(images=[shown], text=[said], **options) for shown, said in firsts]
    if any(each.keys() != made[0].keys() for each in made):
        return None
    found = {key: _together(key, [each[key] for each in made], copies) for key in made[0]}
    return None if any(value is None for value in found.values()) else BatchFeature(found)


def _together(key: str, values: Sequence[Any], copies: int) -> Any:
    """What an entry is of all samples; None where those of samples have other shapes."""
    if not all(isinstance(value, Tensor) for value in values):
        return None
    if key in _OF_TOKENS:  # which trainers put in front of what is generated
        longest = max(value.shape[1] for value in values)
        values = [torch.nn.functional.pad(v, (longest - v.shape[1], 0)) for v in values]
    if any(value.shape[1:] != values[0].shape[1:] for value in values):
        return None
    return torch.cat([value for value in values for _ in range(copies)])
