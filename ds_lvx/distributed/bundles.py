"""Bundles: several tensors as one message, row by row.

The shapes that a rank will receive are always known beforehand, as `Spec`; nothing is asked on the
data plane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ds_lvx.distributed.alignment import padded

Bundle: TypeAlias = list[Tensor]


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

    def empty(self, device: torch.device) -> Tensor:
        """An uninitialised tensor of this spec."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


@dataclass(frozen=True, eq=False)
class Unwritten:
    """Tensors that are to travel, and are written into their message directly.

    Attributes:
        specs: of the tensors.
        device: where they are made.
        write: takes views of these specs into the message, and writes them.
    """

    specs: Sequence[Spec]
    device: torch.device
    write: Callable[[Bundle], None]


def specs_of(tensors: Sequence[Tensor] | Unwritten) -> list[Spec]:
    """The specs of tensors at hand, or of those that are still to be written."""
    if isinstance(tensors, Unwritten):
        return list(tensors.specs)
    return [Spec.of(tensor) for tensor in tensors]


def or_a_byte(tensor: Tensor) -> Tensor:
    """A tensor to exchange; one byte for an empty one: NCCL wants every rank in its first."""
    return tensor if tensor.numel() else tensor.new_empty(1, dtype=torch.uint8)


def go_alike(message: Tensor, sizes: Sequence[int]) -> bool:
    """Whether messages of these bytes go as long as the longest, which adds an eighth at most."""
    return message.device.type != "cpu" and 8 * max(sizes) * len(sizes) <= 9 * sum(sizes)


def lengthened(message: Tensor, size: int) -> Tensor:
    """A message (uint8 ``[bytes]``) of ``size`` bytes; nobody reads what is added."""
    if len(message) == size:
        return message
    longer = message.new_empty(size)
    longer[: len(message)] = message
    return longer


def closed_up(messages: Tensor, sizes: Sequence[int]) -> Tensor:
    """Messages one after the other, without what `lengthened` had added.

    Args:
        messages: uint8 ``[bytes]``, all of the same length.
        sizes: bytes of each that count.
    """
    if len(messages) == sum(sizes):
        return messages
    # Many bytes at once: a row is a multiple of 8, but for odd shapes.
    word = 8 if all(size % 8 == 0 for size in sizes) else 1
    rows = messages.view(len(sizes), -1)
    kept = [row[:size] for row, size in zip(rows, sizes, strict=True)]
    if word == 8:
        kept = [row.view(torch.int64) for row in kept]
    return torch.cat(kept).view(torch.uint8)


class _Place(NamedTuple):
    """A tensor's first byte and bytes in a row, what it has there, and its dimension of rows."""

    start: int
    nbytes: int
    row: Spec
    dim: int


@lru_cache(maxsize=512)
def _places(specs: tuple[Spec, ...], dims: tuple[int, ...]) -> tuple[list[_Place], int]:
    """Where tensors lie in a row of their message, and its bytes; the same for every layer."""
    pairs = zip(specs, dims, strict=True)
    rows = [Spec((*spec.shape[:dim], *spec.shape[dim + 1 :]), spec.dtype) for spec, dim in pairs]
    sizes = padded(row.nbytes for row in rows)
    *starts, end = accumulate(sizes, initial=0)
    fields = zip(starts, rows, dims, strict=True)
    return [_Place(start, row.nbytes, row, dim) for start, row, dim in fields], end


def pack_rows(tensors: Sequence[Tensor] | Unwritten, dims: Sequence[int]) -> Tensor:
    """Copy tensors into one buffer row by row, so that any run of rows is one piece of it.

    Args:
        tensors: of any shapes, as long as each other in their dimension of rows.
        dims: which dimension that is, by tensor.

    Returns:
        uint8 ``[rows, bytes of a row]``; one tensor alone that lies in memory like this is not
        copied.
    """
    if isinstance(tensors, Unwritten):
        device, write = tensors.device, tensors.write
    else:
        alone = tensors[0].movedim(dims[0], 0)
        if len(tensors) == 1 and alone.is_contiguous() and alone.numel() > 1:  # 1 has any stride
            return alone.view(-1).view(torch.uint8).view(len(alone), -1)
        device, write = tensors[0].device, partial(_copy, tensors)
    specs = specs_of(tensors)
    _, row_bytes = _places(tuple(specs), tuple(dims))
    shape = specs[0].shape[dims[0]], row_bytes
    buffer = torch.empty(shape, dtype=torch.uint8, device=device)
    write(unpack_rows(buffer, specs, dims))
    return buffer


def _copy(tensors: Sequence[Tensor], into: Bundle) -> None:
    for view, tensor in zip(into, tensors, strict=True):
        view.copy_(tensor)


def unpack_rows(buffer: Tensor, like: Sequence[Spec], dims: Sequence[int]) -> list[Tensor]:
    """The tensors of packed rows, as views into ``buffer``.

    Args:
        buffer: uint8 ``[..., rows, bytes of a row]``.
        like: tensors of that kind; how many rows they have does not matter.
        dims: of the rows.

    Returns:
        Tensors of those shapes, with the buffer's rows, behind its leading dimensions.
    """
    views, leading = [], buffer.dim() - 2
    for start, nbytes, row, dim in _places(tuple(like), tuple(dims))[0]:
        piece = buffer if len(like) == 1 else buffer.narrow(-1, start, nbytes)
        if not nbytes:  # of no sample, or no query: no bytes can be seen as numbers
            piece = buffer.new_empty((*buffer.shape[:-1], 0), dtype=row.dtype)
        view = piece.view(row.dtype).view(*buffer.shape[:-1], *row.shape)
        views.append(view.movedim(leading, leading + dim) if dim else view)
    return views


def readable(tensor: Tensor) -> Tensor:
    """Rows that arrived, as kernels take them: on an accelerator those of numbers side by side
    from where they lie."""
    dense_rows = tensor.dim() > 3 and tensor.stride(-1) == 1 and tensor.device.type != "cpu"
    return tensor if dense_rows else tensor.contiguous()
