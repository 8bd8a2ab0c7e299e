"""What is visible, covered by rectangles and causal squares: what the field's kernels can compute.

FlashAttention and its like take no rule, but they take slices: some queries that see all of some
keys, or as many queries as keys of which query i sees keys 0 to i. Which ones make up a rule,
`ds_lvx.kernels.covering` finds. Keys that nobody sees, and queries that see nothing, are in none.

Legend: B batch, S queries, T keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ds_lvx.kernels.transfer import to_device


@dataclass(frozen=True)
class Rectangle:
    """Queries that see all of some keys; with ``causal`` a square: query i sees keys 0 to i.

    Attributes:
        batch, queries, keys: slices with both ends.
        causal: as many queries as keys, so that all kernels mean the same diagonal.
        sole_queries, sole_keys: no other rectangle has any of these.
    """

    batch: slice
    queries: slice
    keys: slice
    causal: bool = False
    sole_queries: bool = True
    sole_keys: bool = True

    @property
    def size(self) -> tuple[int, int, int]:
        """Samples, queries, keys."""
        batch, queries, keys = (s.stop - s.start for s in (self.batch, self.queries, self.keys))
        return batch, queries, keys


@dataclass(frozen=True, eq=False)
class Order:
    """Places to gather, by sample: int64 ``[B, n]``, none twice in a row."""

    places: Tensor

    def take(self, tensor: Tensor) -> Tensor:
        """``[B, length, ...]`` -> ``[B, n, ...]``."""
        if len(self.places) == 1:
            return tensor.index_select(1, self.places[0])
        return tensor[self._samples, self.places]

    def put(self, target: Tensor, source: Tensor) -> None:
        """`take` undone: write ``[B, n, ...]`` to where it came from, in target's dtype."""
        source = source.to(target.dtype)
        if len(self.places) == 1:
            target.index_copy_(1, self.places[0], source)
        else:
            target[self._samples, self.places] = source

    @cached_property
    def _samples(self) -> Tensor:
        return torch.arange(len(self.places), device=self.places.device)[:, None]


@dataclass(frozen=True, eq=False)
class Sequences:
    """Rectangles that lie one after the other, and together are all of some queries and keys.

    Attributes:
        queries, keys: int32 ``[N + 1]``, where each begins among those of all samples, and the end.
        longest: queries and keys of the longest.
        causal: all of them are squares.
    """

    queries: Tensor
    keys: Tensor
    longest: tuple[int, int]
    causal: bool

    @classmethod
    def of(cls, rectangles: Sequence[Rectangle], size: tuple[int, int, int]) -> Sequences | None:
        """Those of rectangles in ``(samples, queries, keys)``; None where they are no such thing.

        One rectangle is none: it is a call as it is.
        """
        samples, seqlen_q, seqlen_kv = size
        if len(rectangles) < 2 or len({each.causal for each in rectangles}) > 1:
            return None
        bounds, longest = [(0, 0)], (0, 0)
        for sample in range(samples):
            at = (0, 0)
            own = (r for r in rectangles if r.batch.start <= sample < r.batch.stop)
            for each in sorted(own, key=lambda r: (r.queries.start, r.keys.start)):
                if (each.queries.start, each.keys.start) != at:
                    return None
                at = (each.queries.stop, each.keys.stop)
                bounds.append((sample * seqlen_q + at[0], sample * seqlen_kv + at[1]))
                longest = (max(longest[0], each.size[1]), max(longest[1], each.size[2]))
            if at != (seqlen_q, seqlen_kv):
                return None
        queries, keys = torch.tensor(bounds, dtype=torch.int32, device="cpu").t().contiguous()
        return cls(queries, keys, longest, rectangles[0].causal)

    def to(self, device: torch.device) -> Sequences:
        """For tensors on a device; nobody waits for the copy."""
        queries, keys = (to_device(t, device) for t in (self.queries, self.keys))
        return replace(self, queries=queries, keys=keys)


@dataclass(frozen=True, eq=False)
class Cover:
    """Rectangles that hold every pair of a query and a key that sees it, once.

    Attributes:
        shape: ``(B, S, T)``.
        inner: rectangles of the queries and keys that ``queries`` and ``keys`` gather.
        whole: of queries that see every key, which none of ``inner`` has; all as they lie.
        queries, keys: what ``inner`` counts; None: as they lie.
        sequences: ``inner`` as one launch; None where it is no such thing.
    """

    shape: tuple[int, int, int]
    inner: tuple[Rectangle, ...] = ()
    whole: tuple[Rectangle, ...] = ()
    queries: Order | None = None
    keys: Order | None = None
    sequences: Sequences | None = None

    @classmethod
    @lru_cache(maxsize=64)
    def of_all(cls, batch: int, seqlen_q: int, seqlen_kv: int) -> Cover:
        """Where all see all: one rectangle, or none where there is nothing."""
        shape = (batch, seqlen_q, seqlen_kv)
        one = Rectangle(slice(0, batch), slice(0, seqlen_q), slice(0, seqlen_kv))
        return cls(shape, () if 0 in shape else (one,))

    @property
    def calls(self) -> int:
        """How many calls it takes."""
        return (len(self.inner) if self.sequences is None else 1) + len(self.whole)

    @property
    def rectangles(self) -> tuple[Rectangle, ...]:
        """All of them."""
        return self.inner + self.whole

    @cached_property
    def is_one_call(self) -> bool:
        """One rectangle, of all queries and keys."""
        alone = len(self.inner) == 1 and not self.whole and self.queries is self.keys is None
        return alone and self.inner[0].size == self.shape

    @cached_property
    def merges(self) -> bool:
        """Whether some query is in two rectangles."""
        return not all(each.sole_queries for each in self.inner)

    @cached_property
    def is_deep(self) -> bool:
        """Whether some key is in three rectangles: the sum of two gradients is rounded once."""
        depths = (
            _depth([each.keys for each in self.inner if each.batch == batch])
            + sum(each.batch == batch for each in self.whole)
            for batch in _distinct(each.batch for each in self.rectangles)
        )
        return max(depths, default=0) > 2

    def to(self, device: torch.device) -> Cover:
        """For tensors on a device; nobody waits for the copy."""
        moved = (
            None if order is None else Order(to_device(order.places, device))
            for order in (self.queries, self.keys)
        )
        queries, keys = moved
        sequences = None if self.sequences is None else self.sequences.to(device)
        return replace(self, queries=queries, keys=keys, sequences=sequences)


def _depth(ranges: Sequence[slice]) -> int:
    """How many ranges some place is in."""
    return max((sum(o.start <= one.start < o.stop for o in ranges) for one in ranges), default=0)


def _distinct(slices: Iterator[slice]) -> list[slice]:
    found: list[slice] = []
    for each in slices:
        if each not in found:
            found.append(each)
    return found
