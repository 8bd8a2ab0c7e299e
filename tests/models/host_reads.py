"""What the host asks of numbers that lie on a device, as far as a CPU can tell."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2", "equal")
_INDEXES = ("index", "index_put", "index_put_", "_index_put_impl_")
_CALLS = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu"}


class HostReads:
    """``(operation, place)`` of everything inside for which the host would wait for a GPU."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []
        self._modes = (_Operations(self.found), _Calls(self.found))

    def __enter__(self) -> HostReads:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exc)


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[tuple[str, str]]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [t for t in tree_leaves(args[1:2]) if isinstance(t, Tensor)]
        by_mask = name in _INDEXES and any(t.dtype in (torch.bool, torch.uint8) for t in masks)
        if name in _READS or by_mask:
            self._found.append((name, _place()))
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """What leaves no trace among the operations of a CPU."""

    def __init__(self, found: list[tuple[str, str]]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CALLS:
            self._found.append((_CALLS[func], _place()))
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """Who asked: the innermost function outside of torch."""
    frame: Any = sys._getframe(1)
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-3:])}:{frame.f_code.co_name}"
