"""Bundles: several tensors as one message.

The shapes that a rank will receive are always known beforehand, as `Spec`; nothing is asked on the
data plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

_ALIGNMENT_BYTES = 8  # the widest dtype: a view wants its offset to be a multiple of its item


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor that is still to arrive."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        """The spec of a tensor at hand."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def padded_nbytes(self) -> int:
        """Bytes of the tensor inside a bundle, where the next one starts aligned."""
        return -(-self.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES

    def empty(self, device: torch.device) -> Tensor:
        """An uninitialised tensor of this spec."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Copy tensors into one aligned buffer, uint8 ``[bytes]``."""
    specs = [Spec.of(tensor) for tensor in tensors]
    device = tensors[0].device
    buffer = torch.empty(
        sum(spec.padded_nbytes for spec in specs), dtype=torch.uint8, device=device
    )
    for view, tensor in zip(unpack(buffer, specs), tensors, strict=True):
        view.copy_(tensor)
    return buffer


def unpack(buffer: Tensor, specs: Sequence[Spec]) -> list[Tensor]:
    """The tensors of a bundle, as views into ``buffer`` (uint8 ``[bytes]``)."""
    views, start = [], 0
    for spec in specs:
        piece = buffer[start : start + spec.nbytes]
        views.append(piece.view(spec.dtype).view(spec.shape))
        start += spec.padded_nbytes
    return views


def bundle_nbytes(specs: Sequence[Spec]) -> int:
    """Bytes of a bundle of such tensors."""
    return sum(spec.padded_nbytes for spec in specs)


Bundle: TypeAlias = list[Tensor]
