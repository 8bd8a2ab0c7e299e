"""The largest tensor that some code makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that an operation inside makes; a view costs nothing.

    Args:
        dtype: only tensors of this one; None is any.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.elements = 0
        self._dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {_place(each) for each in (*args, *kwargs.values()) if isinstance(each, Tensor)}
        result = func(*args, **kwargs)
        for made in result if isinstance(result, tuple | list) else (result,):
            new = isinstance(made, Tensor) and _place(made) not in given
            if new and self._dtype in (None, made.dtype):
                self.elements = max(self.elements, made.numel())
        return result


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
