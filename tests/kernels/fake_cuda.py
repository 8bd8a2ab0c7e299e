"""Tensors on a CUDA that is not there: PyTorch's shape functions check what operators are given."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ds_lvx.kernels import late_triton

_aten = torch.ops.aten


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch says of an H100; tensors there are made up."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB")


class WithoutCuda(TorchFunctionMode):
    """Does by operators what PyTorch's Python methods ask a CUDA that is linked for.

    The GPU is of an H100's kind, as far as PyTorch is asked of it, with one multiprocessor, which
    every call fills, and without Triton.
    """

    def __enter__(self) -> Any:
        self._stack = ExitStack()
        properties = SimpleNamespace(multi_processor_count=1)
        for place, name, answer in (
            (torch.cuda, "get_device_capability", (9, 0)),
            (torch.cuda, "get_device_properties", properties),
            (late_triton, "_has_triton", False),
        ):
            self._stack.enter_context(mock.patch.object(place, name, _answers(answer)))
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._stack.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_:
            return _aten.copy_(*args)
        if func is Tensor.contiguous:
            return _aten.clone(*args, memory_format=torch.contiguous_format)
        if func is Tensor.__getitem__:
            return _part(*args)
        if func is Tensor.__setitem__:
            target, places, source = args
            if all(isinstance(each, Tensor) for each in places):
                return _aten.index_put_(target, places, source)
            return _aten.copy_(_part(target, places), source)
        return func(*args, **kwargs or {})


def _answers(answer: Any) -> Callable[..., Any]:
    return lambda *_: answer


def _part(tensor: Tensor, places: Any) -> Tensor:
    """``tensor[places]``."""
    places = places if isinstance(places, tuple) else (places,)
    if all(isinstance(each, Tensor) for each in places):
        return _aten.index(tensor, places)
    dim = 0
    if places[0] is Ellipsis:
        dim, places = tensor.dim() - len(places) + 1, places[1:]
    for each in places:
        if each is None:
            tensor, dim = _aten.unsqueeze(tensor, dim), dim + 1
        elif isinstance(each, slice):
            tensor, dim = _aten.slice(tensor, dim, each.start, each.stop), dim + 1
        else:
            tensor = _aten.select(tensor, dim, each)
    return tensor
