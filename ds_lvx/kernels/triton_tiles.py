"""Which tiles the Triton kernels run with, and which of them see which blocks of keys.

A table from shape and dtype to tile sizes, instead of tuning at run time: every entry is compiled
ahead of time by the tests, for three generations of GPUs, without a register spilled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_lvx.kernels.visibility import Visibility

MIN_ROWS = 16  # the least that a tensor core takes
_INT32 = torch.iinfo(torch.int32)


@dataclass(frozen=True)
class Tiles:
    """How a kernel is compiled.

    Attributes:
        rows: BLOCK_M, query rows of a tile (heads of a group packed).
        keys: BLOCK_N, keys of a block.
        warps, stages: of Triton.
    """

    rows: int
    keys: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.keys,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def padded(head_dim: int) -> int:
    """BLOCK_D: the power of two that holds a head, at least 16."""
    return max(MIN_ROWS, 1 << (head_dim - 1).bit_length())


def shape_options(q: Tensor, k: Tensor, visibility: Visibility | None) -> dict[str, Any]:
    """What else a kernel is compiled for."""
    return {
        "GROUP": q.shape[2] // k.shape[2],
        "HEAD_DIM": q.shape[3],
        "BLOCK_D": padded(q.shape[3]),
        "VISIBILITY": visibility is not None,
        # fp32 means fp32: TF32 has three digits.
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def count(length: int, size: int) -> int:
    """Blocks of ``size`` that hold ``length``."""
    return -(-length // size)


def splits(programs: int, blocks: int, processors: int) -> int:
    """Into how many parts to split the keys of each tile.

    Two programs for every multiprocessor hide the tail of the last ones; a part shorter than four
    blocks would spend its time on being merged.
    """
    return max(1, min(count(2 * processors, max(programs, 1)), blocks // 4))


class Seen:
    """Which tiles of rows see which blocks of keys, as lists that a kernel walks over.

    Everything stays on the device. A list holds the numbers of what is seen first; the counts say
    where it ends.

    Args:
        visibility: of the queries over the keys.
        group: query heads of a key/value head.
        tiles: the tiles of the kernel.
    """

    def __init__(self, visibility: Visibility, *, group: int, tiles: Tiles) -> None:
        start, end = (
            t.repeat_interleave(group, dim=1) for t in (visibility.q_start, visibility.q_end)
        )
        sees = start < end
        first = _reduced(start.masked_fill(~sees, _INT32.max), tiles.rows, least=True)
        last = _reduced(end.masked_fill(~sees, _INT32.min), tiles.rows, least=False)
        low = _reduced(visibility.kv_pos, tiles.keys, least=True)
        high = _reduced(visibility.kv_pos, tiles.keys, least=False)
        self._meet = (high[:, None] >= first[:, :, None]) & (low[:, None] < last[:, :, None])

    def blocks_of_tiles(self) -> tuple[Tensor, Tensor]:
        """int32 ``[B, tiles, blocks]``, and how many of them count, ``[B, tiles]``."""
        return _listed(self._meet)

    def tiles_of_blocks(self) -> tuple[Tensor, Tensor]:
        """int32 ``[B, blocks, tiles]``, and how many of them count, ``[B, blocks]``."""
        return _listed(self._meet.transpose(1, 2))


def _reduced(values: Tensor, size: int, *, least: bool) -> Tensor:
    """Minimum or maximum of each run of ``size`` values."""
    missing = -values.shape[1] % size
    fill = _INT32.max if least else _INT32.min
    runs = torch.nn.functional.pad(values, (0, missing), value=fill).unflatten(1, (-1, size))
    return runs.amin(dim=2) if least else runs.amax(dim=2)


def _listed(meet: Tensor) -> tuple[Tensor, Tensor]:
    order = meet.to(torch.int8).argsort(dim=2, descending=True, stable=True)
    return order.to(torch.int32).contiguous(), meet.sum(dim=2, dtype=torch.int32).contiguous()
