"""Whether methods compute the same: against each other, and against the float64 oracle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds_lvx.attention.oracle import attention_oracle
from ds_lvx.compare.operators.tensors import Shape, make_shards

TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
"""Largest difference, as a share of the tensor's largest value. Rounding stays well below; a lost
shard, mask or factor is far above."""
EXACT = "float64 oracle"
_SCORES, _QUERIES = 2**21, 256


@dataclass(frozen=True)
class Difference:
    """The largest difference between ``one`` and ``other``'s result of a tensor on a rank."""

    one: str
    other: str
    tensor: str  # ``out``, or ``d`` and the name of an input
    error: float  # as a share of the largest value of both; infinite where one is not a number
    index: tuple[int, ...]  # where it is in this rank's shard
    values: tuple[float, float]  # what both have there
    tolerance: float  # what ``error`` may be
    rank: int
    shape: str  # whether it is of the ``"whole"`` shape, or of a ``"small"`` one like it

    @property
    def is_too_large(self) -> bool:
        """Whether the two disagree."""
        return not self.error <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{self.one} and {self.other} disagree on {self.tensor}: the largest error is "
            f"{self.error:.2g} of the largest value (expected at most {self.tolerance:.2g}), on "
            f"rank {self.rank} at {list(self.index)} of its shard: {self.values[0]:.6g} and "
            f"{self.values[1]:.6g} ({self.shape} shape)"
        )


def small(shape: Shape) -> Shape:
    """A shape like this one whose scores fit the oracle; this one where it does already."""
    queries = min(shape.seqlen_q, _QUERIES)
    keys = max(_SCORES // (shape.batch * shape.heads * queries), 1)
    return replace(shape, seqlen_q=queries, seqlen_kv=min(shape.seqlen_kv, keys))


def differences(
    results: Mapping[str, Mapping[str, Tensor]], *, dtype: str, rank: int, shape: str
) -> list[Difference]:
    """The largest difference of every tensor, between all methods that have it."""
    found = []
    for (one, own), (other, others) in itertools.combinations(results.items(), 2):
        for tensor in (name for name in own if name in others and own[name].numel()):
            error, index = largest(own[tensor], others[tensor])
            values = own[tensor][index].item(), others[tensor][index].item()
            found.append(
                Difference(one, other, tensor, error, index, values, TOLERANCES[dtype], rank, shape)
            )
    return found


def largest(one: Tensor, other: Tensor) -> tuple[float, tuple[int, ...]]:
    """The largest difference, as a share of the largest value of both, and where it is.

    Infinities have to agree; where something else is not a number, the difference is infinite.
    """
    one, other = one.double(), other.double()
    difference = (one - other).abs().nan_to_num(nan=math.inf).masked_fill(one == other, 0.0)
    index = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    numbers = (t.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for t in (one, other))
    scale = max(t.abs().max().item() for t in numbers)
    error = difference[index].item()
    return error / scale if error and scale else error, index


def exact(shape: Shape, *, ranks: int, rank: int, device: torch.device) -> dict[str, Tensor]:
    """This rank's shards of what every method should compute, in float64.

    Weights of a projection have this rank's part of their gradient, as in a run.
    """
    shards = [make_shards(shape, ranks=ranks, shards=[r], device=device) for r in range(ranks)]
    parts = [shard.in_float64() for shard in shards]
    whole = make_shards(shape, ranks=ranks, shards=range(ranks), device=device)
    k, v = (torch.cat(each, dim=1) for each in zip(*(p.k_and_v() for p in parts), strict=True))
    q = torch.cat([part.q for part in parts], dim=1)
    out, _ = attention_oracle(q, k, v, visibility=whole.visibility)
    outs = out.split([part.q.shape[1] for part in parts], dim=1)
    # One backward for all: each part's output takes the gradients of the others along.
    out.backward(torch.cat([part.dout for part in parts], dim=1))
    gradients = {f"d{name}": leaf.grad for name, leaf in parts[rank].leaves.items()}
    return {"out": outs[rank].detach()} | {n: g for n, g in gradients.items() if g is not None}
