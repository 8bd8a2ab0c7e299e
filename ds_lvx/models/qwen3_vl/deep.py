"""DeepStack on a rank's part of a batch: features go to their places, and no mask is counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ds_lvx.models.patch import Hook

_METHOD = "_deepstack_process"


class AddDeep(Hook):
    """A forward pre-hook of the text model; it only knows what to put back.

    In the place of the model's own way to add features it puts itself as `add`.
    """

    def __init__(self, text: Any) -> None:
        self._text, self._before = text, vars(text).get(_METHOD)
        self._own = getattr(text, _METHOD)
        setattr(text, _METHOD, self.add)

    def __call__(self, module: nn.Module, args: Any) -> None:
        return None

    def add(self, hidden: Tensor, places: Tensor, features: Tensor) -> Tensor:
        """What goes on to the next layer of the text.

        Args:
            hidden: ``[B, n, hidden]``.
            places: int64 ``[tokens]`` in ``[B * n]``; or as the model has it, bool ``[B, n]``.
            features: ``[tokens, hidden]``.
        """
        if places.dtype == torch.bool:
            own: Tensor = self._own(hidden, places, features)
            return own
        flat = hidden.flatten(0, 1)
        return flat.index_add(0, places, features.to(hidden.dtype)).view_as(hidden)

    def undo(self) -> None:
        """Give the model its own way back."""
        vars(self._text).pop(_METHOD, None)
        if self._before is not None:
            setattr(self._text, _METHOD, self._before)
