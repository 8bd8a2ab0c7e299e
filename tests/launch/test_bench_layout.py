"""What a batch settles, as the benchmark of layouts makes it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench_layout

MIB = 2**20


class Written(TorchDispatchMode):
    """Counts the bytes of all that is computed on the host."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.is_cpu and not func.is_view:
                self.nbytes += each.nbytes
        return result


def test_the_layout_of_a_long_batch_computes_little() -> None:
    """Of 4,096 tokens and 1.5 million visual ones, whose rule is 6 MiB: its time follows."""
    given = bench_layout.batch()
    with Written() as written:
        bench_layout.make(given)
    assert 6 * MIB < written.nbytes < 36 * MIB
