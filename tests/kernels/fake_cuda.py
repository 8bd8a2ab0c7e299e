"""Tensors on a CUDA that is not there: PyTorch's shape functions check what operators are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten


class WithoutCuda(TorchFunctionMode):
    """Does by operators what PyTorch's Python methods ask a CUDA that is linked for."""

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
