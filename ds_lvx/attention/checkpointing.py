"""Activation checkpointing in which attention runs once: `checkpointing`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import deepspeed
import torch
import torch.utils.checkpoint
from deepspeed.accelerator import get_accelerator
from torch import nn

from ds_lvx.attention.replay import Box

_OFFLOADING = "PreTrainedModel._activation_checkpointing_enable.<locals>.checkpoint_func"


class Checkpointing:
    """A checkpoint function whose calls own a `Box` each; see `checkpointing`.

    Attributes:
        function: the checkpoint function itself.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._fails_at_stage_3 = (
            _unpacked(function) is deepspeed.checkpointing.non_reentrant_checkpoint
        )

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(*args)`` under the checkpoint function, whose settings may be in ``kwargs``.

        Raises:
            NotImplementedError: DeepSpeed's non-reentrant checkpoint under ZeRO-3.
        """
        if self._fails_at_stage_3 and any(is_partitioned(m) for m in _modules(function)):
            raise NotImplementedError(
                "deepspeed.checkpointing.non_reentrant_checkpoint: got a layer whose parameters "
                "ZeRO stage 3 has partitioned, on which it fails in backward; use "
                "deepspeed.checkpointing.checkpoint or torch.utils.checkpoint.checkpoint, or a "
                "stage below 3"
            )
        if not torch.is_grad_enabled():
            return self.function(function, *args, **kwargs)
        box, autocast = Box(), _autocast()

        def run(*arguments: Any, **keywords: Any) -> Any:
            # DeepSpeed's reentrant function runs again outside the caller's autocast.
            with box.open(), ExitStack() as stack:
                for device, enabled, dtype in autocast:
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
                return function(*arguments, **keywords)

        return self.function(run, *args, **kwargs)


def checkpointing(checkpoint_function: Callable[..., Any]) -> Checkpointing:
    """The same checkpoint function, for layers in which attention must not run twice.

    A checkpointed layer runs again in backward. With this one, its attention does not: a call keeps
    ``out`` and ``lse`` of ds_lvx's attention from the first pass (`ulysses_attention`: q, k and v
    behind the all-to-alls as well), and the second pass runs no kernel and no collective. Whatever
    else the layer does runs again as before, under the autocast of the first pass. What was kept
    goes when its backward is done; a second backward through a retained graph computes for real
    (with ``deepspeed.checkpointing.checkpoint`` there is none: DeepSpeed raises a TypeError).

    The reentrant functions give gradients to positional tensors only; in a patched model ds_lvx
    passes a layer's keywords by position.

    Under ``partition_activations`` or ``cpu_checkpointing`` DeepSpeed empties a call's arguments
    after saving them; mark tensors that several layers share, ``features.no_checkpointing = True``,
    and it keeps them by reference, once.

    Args:
        checkpoint_function: ``deepspeed.checkpointing.checkpoint``,
            ``deepspeed.checkpointing.non_reentrant_checkpoint`` (not under ZeRO-3), or
            ``torch.utils.checkpoint.checkpoint``, reentrant or not; or a ``functools.partial`` of
            one of them. What this function returned comes back as it is.

    Returns:
        A function of the same arguments. It is called like the one it wraps.

    Raises:
        ValueError: another function.

    Collectives: none.
    Kept for backward, a call of lvx or ring: out ``[batch, seqlen_q, num_heads, head_dim]`` and
    lse, of this rank's queries; nothing of the size of K or V.
    """
    if isinstance(checkpoint_function, Checkpointing):
        return checkpoint_function
    return Checkpointing(checkpoint_function)


def _autocast() -> list[tuple[str, bool, torch.dtype]]:
    """The autocast in force: device, whether enabled, dtype."""
    devices = sorted({"cpu", get_accelerator().device_name()})
    return [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]


def _unpacked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The one of the four functions that is inside partials."""
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    known = (
        deepspeed.checkpointing.checkpoint,
        deepspeed.checkpointing.non_reentrant_checkpoint,
        torch.utils.checkpoint.checkpoint,
    )
    # transformers' own, around torch's, when it is asked to hold activations on the host.
    if inner in known or getattr(inner, "__qualname__", "") == _OFFLOADING:
        return inner
    name = getattr(inner, "__qualname__", type(inner).__name__)
    module = getattr(inner, "__module__", None)
    raise ValueError(
        f"checkpointing: got {name if module is None else f'{module}.{name}'}; expected "
        "deepspeed.checkpointing.checkpoint, deepspeed.checkpointing.non_reentrant_checkpoint or "
        "torch.utils.checkpoint.checkpoint (reentrant or not), or a functools.partial of one"
    )


def _modules(function: Any) -> Iterator[nn.Module]:
    """The modules that a function is made of, as far as they can be seen."""
    if isinstance(function, nn.Module):
        yield function
    elif isinstance(function, functools.partial):
        for part in (function.func, *function.args):
            yield from _modules(part)
    elif isinstance(getattr(function, "__self__", None), nn.Module):
        yield function.__self__
    else:
        names = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
        for value in names.values():
            if isinstance(value, nn.Module | functools.partial):
                yield from _modules(value)


def is_partitioned(module: nn.Module) -> bool:
    """Whether ZeRO-3 has split the parameters of a module over the ranks: all of them, or none."""
    return hasattr(next(module.parameters(), None), "ds_status")  # each batch asks
