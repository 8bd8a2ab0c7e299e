"""What the kernel benchmark computes: shapes of the paper's models, with random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from bench.kernels.roofline import Work, work
from ds_lvx.compare.operators.tensors import Shape, Shards, make_shards, visibility
from ds_lvx.models.cuts import split

DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class KernelCase:
    """Cross-attention of one layer on one rank."""

    model: str  # whose cross-attention it is
    ranks: int  # that share the sample
    shape: Shape  # of the rank's queries and keys, in bf16; with ``shard`` of the whole sequence
    # Which of the ranks it is, over whose keys all queries go; None: ``shape`` says all.
    shard: int | None = None

    @property
    def name(self) -> str:
        """Such as ``mllama-192``, ``mllama-192-visibility`` or ``moss_vl-2304-of8``."""
        rule = "" if self.shape.visibility == "all" else "-visibility"
        part = "" if self.shard is None else f"-of{self.ranks}"
        return f"{self.model}-{self.shape.seqlen_q}{part}{rule}"

    @property
    def keys(self) -> range:
        """Which of the sequence's keys the rank has."""
        shard = self.shard or 0
        lengths = split(self.shape.seqlen_kv, 1 if self.shard is None else self.ranks)
        return range(sum(lengths[:shard]), sum(lengths[: shard + 1]))

    def draw(self, device: torch.device) -> Shards:
        """All queries, and the rank's keys."""
        ranks, shard = (1, 0) if self.shard is None else (self.ranks, self.shard)
        every = range(ranks)
        return make_shards(self.shape, ranks=ranks, shards=[shard], device=device, of_queries=every)

    def shares(self) -> tuple[float, float]:
        """Of all pairs those in which the query sees the key, and of the keys those it sees."""
        keys, places = len(self.keys), torch.arange(self.keys.start, self.keys.stop)
        sees = visibility(self.shape, torch.arange(self.shape.seqlen_q), places)
        if sees is None:
            return 1.0, 1.0
        position = sees.kv_pos[0]  # in order: a query sees a run of keys
        first, behind = (torch.searchsorted(position, e[0]) for e in (sees.q_start, sees.q_end))
        runs = torch.zeros(keys + 1, dtype=torch.int64)
        for edges, begins in ((first, 1), (behind, -1)):
            runs.index_add_(0, edges, torch.full_like(edges, begins))
        visible = (behind - first).sum().item() / self.shape.seqlen_q / keys
        return visible, (runs.cumsum(0) > 0).sum().item() / keys

    def work(self, direction: str) -> Work:
        """Operations and bytes of ``"forward"`` or ``"backward"``."""
        visible, seen = self.shares()
        own = replace(self.shape, seqlen_kv=len(self.keys))
        return work(own, direction, visible=visible, seen=seen)


def _cases(
    model: str, ranks: int, queries: tuple[int, ...], keys: int, heads: tuple[int, int, int]
) -> Iterator[KernelCase]:
    """Without and with visibility; heads are those of q, those of K and V, and their size."""
    for each in queries:
        shape = Shape(each, keys, heads=heads[0], kv_heads=heads[1], head_dim=heads[2])
        yield KernelCase(model, ranks, shape)
        yield KernelCase(model, ranks, replace(shape, visibility="frames"))


PAPER = (
    *_cases("mllama", 6, (1, 192, 384, 4096), 20 * 6404, (32, 8, 128)),
    *_cases("mplug_owl3", 16, (4096,), 128 * 729, (28, 4, 128)),
    *_cases("openflamingo", 16, (32768,), 2048 * 64, (8, 8, 64)),
)
"""Llama-3.2-Vision on 6 ranks with 125K keys each, mPLUG-Owl3-7B on 16 with 91K, OpenFlamingo on 16
with 128K: whole frames, so 128,080, 93,312 and 131,072 keys."""


_MOSS = Shape(2304, 256 * 721, heads=32, kv_heads=8, head_dim=128, frames=256)
MOSS = tuple(
    KernelCase("moss_vl", ranks, replace(_MOSS, visibility=rule), ranks // 2)
    for ranks, rule in product((1, 2, 4, 8), ("all", "prefix"))
)
"""MOSS-VL's 256 frames of 721 keys on 1 to 8 ranks, as the middle one has them: text between the
frames, which it sees up to its own place."""

TEXT = tuple(
    KernelCase("text", 1, Shape(length, length, 1, 32, 8, 128, visibility="causal"))
    for length in (4096, 16384)
)
"""Self-attention of the text, which every method but ring attention computes in one piece."""

MEASURED = (
    *(*PAPER[2:6], *MOSS[-2:], *TEXT[:1], *PAPER[:2], *PAPER[6:8], *MOSS[:2], *MOSS[2:-2]),
    *(*PAPER[8:], *TEXT[1:]),
)
"""All of them, in the order in which a run that is cut short should have them."""

QUICK = (
    *_cases("tiny", 2, (24,), 320, (4, 2, 32)),
    *_cases("tiny", 2, (1,), 160, (2, 2, 16)),
    KernelCase("tiny_prefix", 4, Shape(24, 336, 1, 4, 2, 32, visibility="prefix", frames=8), 2),
)
"""To try the script."""
