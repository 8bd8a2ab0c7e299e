"""What `torch.set_default_device` does to a package that leaves devices out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import ds_lvx

_PACKAGE = str(Path(ds_lvx.__file__).parent)


class ElsewhereByDefault(TorchFunctionMode):
    """Tensors that ds_lvx makes without a device are on another, where nothing can be computed, as
    what is the host's would be on a GPU. Enter it last."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else dict(kwargs)
        ours = sys._getframe(1).f_code.co_filename.startswith(_PACKAGE)
        if ours and func in _device_constructors() and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
