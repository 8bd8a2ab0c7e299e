"""Which tiles the Triton kernels run with.

A table from shape and dtype to tile sizes, instead of tuning at run time: every entry is compiled
ahead of time by the tests, for three generations of GPUs, without a register spilled but where a
measurement says that it does not matter, and ten at most for heads of 512 or a rule with gaps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_lvx.kernels.device import BLACKWELL, HOPPER
from ds_lvx.kernels.interface import Problem

MIN_ROWS = 16  # the least that a tensor core takes

LENGTHS = ("seqlen", "seqlen_q", "seqlen_kv", "rows_of_all", "splits", "mine")
"""Arguments whose values Triton must not compile for: another text would be another kernel."""
OF_RULE = ("q_start", "q_end", "gap_start", "gap_end", "kv_pos", "visible", "counts")
"""Arguments in int32: a rule, and the lists of what meets."""
ANY_ADDRESS = (*OF_RULE, "lse", "delta")
"""Arguments that may begin anywhere, such as in the middle of a rule, and are read one by one."""


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


WIDE, WIDEST_BYTES = 256, 132 * 1024
"""A head_dim above which a block needs so much shared memory: A100, and Hopper on, but no cards for
desktops."""


def padded(head_dim: int) -> int:
    """BLOCK_D: the power of two that holds a head, at least 16."""
    return max(MIN_ROWS, 1 << (head_dim - 1).bit_length())


def shape_options(problem: Problem) -> dict[str, Any]:
    """What else a kernel is compiled for."""
    q, k = problem.q, problem.k
    return {
        "GROUP": q.shape[2] // k.shape[2],
        "HEAD_DIM": q.shape[3],
        "BLOCK_D": padded(q.shape[3]),
        "VISIBILITY": problem.rule is not None,
        # fp32 means fp32: TF32 has three digits.
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def forward_tiles(q: Tensor, k: Tensor, capability: int) -> Tiles:
    """Tiles of the forward kernel.

    Args:
        q, k: what it computes.
        capability: of the GPU, such as 90.
    """
    rows, wide = _rows(q, k), padded(q.shape[3])
    if wide > WIDE:
        return _widest(q, rows, keys=32)
    if q.dtype == torch.float32:
        return _FP32
    if wide > 128:
        return Tiles(_least(rows, 64), 64, 8, 2)
    if rows <= 64:
        return Tiles(_least(rows, 64), 64, 4, 3)
    if _is_hoppers(q, rows, capability):
        return Tiles(128, 128, 8, 3)
    return Tiles(128, 64 if wide > 64 else 128, 8, 3)


def queries_tiles(q: Tensor, k: Tensor, capability: int) -> Tiles:
    """Tiles of the kernel that makes dq; see `forward_tiles`."""
    rows, wide = _rows(q, k), padded(q.shape[3])
    if wide > WIDE:
        return _widest(q, rows, keys=32)
    if q.dtype == torch.float32:
        return _FP32 if wide <= 128 else Tiles(16, 16, 4, 1)
    if wide > 128:
        return Tiles(_least(rows, 64), 32, 8, 2)
    if _is_hoppers(q, rows, capability):
        return Tiles(128, 64, 8, 3)
    return Tiles(_least(rows, 64), 32 if _masked(q) else 64, 4, 2)


def keys_tiles(q: Tensor, k: Tensor, capability: int) -> Tiles:
    """Tiles of the kernel that makes dk and dv; see `forward_tiles`."""
    rows, wide = _rows(q, k), padded(q.shape[3])
    if wide > WIDE:
        return _widest(q, rows, keys=16)
    if q.dtype == torch.float32:
        return _FP32 if wide <= 128 else Tiles(16, 16, 8, 1)
    if wide > 128:
        return Tiles(_least(rows, 32), 32, 8, 2)
    if rows <= 16:
        # The loop has one step: several programs on a multiprocessor hide each other's loads.
        return Tiles(16, 64, 4, 2)
    if _is_hoppers(q, rows, capability):
        return Tiles(32, 64, 4, 2)
    return Tiles(_least(rows, 64), 64, 8, 3) if wide > 64 else Tiles(_least(rows, 64), 128, 8, 2)


def atomic_tiles(q: Tensor, k: Tensor, capability: int) -> Tiles:
    """Tiles of the same kernel where it adds up dq, too; see `forward_tiles`."""
    rows, wide = _rows(q, k), padded(q.shape[3])
    if q.dtype == torch.float32 or wide > 128:
        return keys_tiles(q, k, capability)
    if rows <= 16 and _masked(q):
        return Tiles(16, 32, 4, 2)
    if _is_hoppers(q, rows, capability):
        return Tiles(64, 128, 8, 2)
    return Tiles(_least(rows, 64 if wide <= 64 else 32), 64, 8, 2)


# Exact fp32 has no tensor cores to feed; more would not fit the registers.
_FP32 = Tiles(16, 32, 8, 1)


def _widest(q: Tensor, rows: int, *, keys: int) -> Tiles:
    """Of heads that fill the registers by themselves."""
    return Tiles(16, 16, 8, 1) if q.dtype == torch.float32 else Tiles(_least(rows, 32), keys, 8, 2)


def _is_hoppers(q: Tensor, rows: int, capability: int) -> bool:
    """Whether tiles are those that were the fastest of some 25 on an H200, at head_dim 128.

    They are that although some of them spill a few registers.
    """
    return (
        HOPPER <= capability < BLACKWELL
        and rows > 64
        and padded(q.shape[3]) == 128
        and not _masked(q)
    )


def _masked(q: Tensor) -> bool:
    """Whether a head is shorter than its tile, whose columns have masks then: more registers."""
    return padded(q.shape[3]) != q.shape[3]


def _rows(q: Tensor, k: Tensor) -> int:
    return q.shape[1] * (q.shape[2] // k.shape[2])


def _least(rows: int, at_most: int) -> int:
    return min(at_most, padded(rows))


def count(length: int, size: int) -> int:
    """Blocks of ``size`` that hold ``length``."""
    return -(-length // size)


def splits(programs: int, blocks: int, processors: int) -> int:
    """Into how many parts to split the keys of each tile.

    Two programs for every multiprocessor hide the tail of the last ones; a part shorter than four
    blocks would spend its time on being merged.
    """
    return max(1, min(count(2 * processors, max(programs, 1)), blocks // 4))
