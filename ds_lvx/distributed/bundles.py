"""Bundles: several tensors as one message, one after the other or row by row.

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


def pack_rows(tensors: Sequence[Tensor], dims: Sequence[int]) -> Tensor:
    """Copy tensors into one buffer row by row, so that any run of rows is one piece of it.

    Args:
        tensors: of any shapes, as long as each other in their dimension of rows.
        dims: which dimension that is, by tensor.

    Returns:
        uint8 ``[rows, bytes of a row]``.
    """
    rows = tensors[0].shape[dims[0]]
    specs = [_row_of(Spec.of(tensor), dim) for tensor, dim in zip(tensors, dims, strict=True)]
    device = tensors[0].device
    buffer = torch.empty(rows, bundle_nbytes(specs), dtype=torch.uint8, device=device)
    for view, tensor in zip(_unpack_rows(buffer, specs, dims), tensors, strict=True):
        view.copy_(tensor)
    return buffer


def unpack_rows(buffer: Tensor, like: Sequence[Spec], dims: Sequence[int]) -> list[Tensor]:
    """The tensors of packed rows, as views into ``buffer``.

    Args:
        buffer: uint8 ``[..., rows, bytes of a row]``.
        like: tensors of that kind; how many rows they have does not matter.
        dims: of the rows.

    Returns:
        Tensors of those shapes, with the buffer's rows, behind its leading dimensions.
    """
    return _unpack_rows(
        buffer, [_row_of(spec, dim) for spec, dim in zip(like, dims, strict=True)], dims
    )


def _row_of(spec: Spec, dim: int) -> Spec:
    return Spec((*spec.shape[:dim], *spec.shape[dim + 1 :]), spec.dtype)


def _unpack_rows(buffer: Tensor, rows: Sequence[Spec], dims: Sequence[int]) -> list[Tensor]:
    views, start = [], 0
    leading = buffer.dim() - 2
    for spec, dim in zip(rows, dims, strict=True):
        piece = buffer[..., start : start + spec.nbytes].view(spec.dtype)
        view = piece.view(*buffer.shape[:-1], *spec.shape)
        views.append(view.movedim(leading, leading + dim))
        start += spec.padded_nbytes
    return views


Bundle: TypeAlias = list[Tensor]
