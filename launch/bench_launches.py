"""How much the host launches for one cross-attention layer: counted, on a machine without a GPU.

    python launch/bench_launches.py [--document docs/benchmarks/launches.json]

A layer's attention runs forward and backward on fake CUDA tensors, as rank 0 of ranks that are not
there, and every operation that launches something is counted, transfers among them. A block's
kernel counts as one launch, as in Triton; the projections of q, K and V are not part of it, and all
see all. An operation may launch several kernels (logsumexp does), and the sends and receives of one
batch are one launch in NCCL.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.fake_cuda import DEVICE, FakeCuda
from ds_lvx.attention import lvx, ring, ulysses
from ds_lvx.attention.call import Call
from ds_lvx.attention.layout import Layout
from ds_lvx.compare.document import save
from ds_lvx.compare.machine import header
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.interface import Kernel, Problem, Upstream

RANKS, QUERIES, KEYS = 4, 512, 8192  # queries and keys of a rank
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
WAYS = {
    "lvx gather": (lvx.attend, "gather"),
    "lvx ring": (lvx.attend, "ring"),
    "ring": (ring.attend, "gather"),
    "ulysses": (ulysses.attend, "gather"),
}


@contextmanager
def made_up_ranks(ranks: int) -> Iterator[None]:
    """``torch.distributed`` as rank 0 of ``ranks`` that are not there; they agree to everything."""

    def agree(self: Channel, record: dict[str, Any], error: Exception | None = None) -> Any:
        if error is not None:
            raise error
        return [record] * self.size

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        with mock.patch.object(Channel, "agree", agree):
            yield
    finally:
        dist.destroy_process_group()


class OneLaunch(Kernel):
    """A kernel of one launch a block, forward and backward, with results as those of a GPU's."""

    name = "one launch"

    def __init__(self, fake: FakeCuda) -> None:
        self._fake = fake
        self.runs = 0

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """See `ds_lvx.kernels.interface.Kernel.forward`."""
        self.runs += 1
        q = problem.q
        dtype = torch.float32 if problem.partial else q.dtype
        with self._fake.paused():
            out = torch.zeros(q.shape, dtype=dtype, device=q.device)
            return out, out.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)

    def fold(self, problem: Problem, running: tuple[Tensor, Tensor]) -> None:
        """See `ds_lvx.kernels.interface.Kernel.fold`: merged by the kernel, as `triton` does."""
        self.runs += 1

    def backward(
        self,
        problem: Problem,
        upstream: Upstream,
        *,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ds_lvx.kernels.interface.Kernel.backward`."""
        self.runs += 1
        with self._fake.paused():
            dk, dv = into or (torch.empty_like(problem.k), torch.empty_like(problem.v))
            return torch.empty(problem.q.shape, device=problem.q.device), dk, dv


def count(way: str, *, queries: int = QUERIES, ranks: int = RANKS) -> dict[str, Any]:
    """Launches of one layer in bf16 at B = 1, forward and backward.

    Args:
        way: a key of ``WAYS``.
        queries: of a rank.
        ranks: that share the sequence.

    Returns:
        ``{"forward": {"total", "kernel", "operations": {name: launches}}, "backward": ...}``.
    """
    attend, schedule = WAYS[way]
    found = {}
    with made_up_ranks(ranks), FakeCuda() as fake:
        kernel = OneLaunch(fake)
        lengths = (queries,) * ranks, (KEYS,) * ranks
        layout = Layout(Channel.world(), *lengths, device=DEVICE)
        call = Call(layout, kernel, HEAD_DIM**-0.5, schedule=schedule, requires_grad=True)
        q, k, v = (
            torch.empty(1, n, heads, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
            for n, heads in ((queries, HEADS), (KEYS, KV_HEADS), (KEYS, KV_HEADS))
        )
        fake.reset()
        out = attend(call, q, k, v)[0]
        found["forward"] = _entry(fake, kernel)
        dout = torch.empty_like(out)
        fake.reset()
        torch.autograd.grad(out, (q, k, v), dout)
        found["backward"] = _entry(fake, kernel)
    return found


def _entry(fake: FakeCuda, kernel: OneLaunch) -> dict[str, Any]:
    runs, kernel.runs = kernel.runs, 0
    operations = Counter({**fake.launches, "kernel": runs})
    return {"total": operations.total(), "operations": dict(operations.most_common())}


def main() -> None:
    """Count, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--document", type=Path, help="the JSON to write")
    options = parser.parse_args()
    shape = {"ranks": RANKS, "batch": 1, "queries": QUERIES, "keys": KEYS, "dtype": "bfloat16"}
    shape |= {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    launches = {way: count(way) for way in WAYS}
    for way, passes in launches.items():
        print(f"{way}: {passes['forward']['total']} + {passes['backward']['total']}")
    if options.document is not None:
        record = {**header(predicted=True), "shape": shape, "launches": launches}
        save(record, options.document)


if __name__ == "__main__":
    main()
