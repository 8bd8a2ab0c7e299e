"""Which tiles the Triton kernels run with.

A table from shape and dtype to tile sizes, instead of tuning at run time: every entry is compiled
ahead of time by the tests, for three generations of GPUs, without a register spilled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ds_lvx.kernels.interface import Problem

MIN_ROWS = 16  # the least that a tensor core takes

LENGTHS = ("seqlen", "seqlen_q", "seqlen_kv", "rows_of_all", "splits", "mine")
"""Arguments whose values Triton must not compile for: another text would be another kernel."""
ANY_ADDRESS = ("q_start", "q_end", "kv_pos", "visible", "counts", "lse", "delta")
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


def count(length: int, size: int) -> int:
    """Blocks of ``size`` that hold ``length``."""
    return -(-length // size)


def splits(programs: int, blocks: int, processors: int) -> int:
    """Into how many parts to split the keys of each tile.

    Two programs for every multiprocessor hide the tail of the last ones; a part shorter than four
    blocks would spend its time on being merged.
    """
    return max(1, min(count(2 * processors, max(programs, 1)), blocks // 4))
