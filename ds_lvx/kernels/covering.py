"""Finding the cover of a rule: on the CPU, once a rule.

By the positions of its keys in order, every query sees one range of keys, or two with a gap
between. Queries of one range are a rectangle; queries whose range grows by one key are a rectangle
and a causal square. Rectangles that share keys can be cut the other way, by keys, so that each key
is read once and results merge by lse.

Where what nobody sees lies between, or positions are not in order, the call gathers what is left
(`Order`). Queries that see every key, of which others see no more than a part, can stand apart,
over the keys as they lie: text before the first image sees the padding of all images, and nobody
else does. Which of these covers is taken is a matter of bytes (`_cost`).

Legend: B batch, S queries, T keys, n ranges of a query, 1 or 2; a range is ``[first, stop)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

from ds_lvx.kernels.cover import Cover, Order, Rectangle, Sequences
from ds_lvx.kernels.visibility import Visibility

MOST_CALLS = 16
"""Of a sample: more of them, and the Triton kernel, which is one call, serves better."""
MOST_LARGE_CALLS, LARGE_CALL_SCORES = 64, 2**20
"""More calls are as good where each has so much to do that its launch hides behind it: a launch
takes the host some 20 us, and 2**20 scores of 32 heads of 128 take an H100 some 40."""
MOST_SEQUENCES = 256
"""Of a sample, where they are one launch."""

# Bytes that a cover moves, in units of one key of one head of K and V, forward and backward.
_QUERY = 4  # queries come with four heads a key/value head, and their results are merged in fp32
_GATHERED_QUERY, _GATHERED_KEY = 4, 2
_CALL = 4096  # what the device could move while the host launches


def cover_of(rule: Visibility) -> Cover | None:
    """The cover of a rule that moves the fewest bytes; None where it takes too many calls.

    Args:
        rule: on the CPU.
    """
    batch, seqlen_q, seqlen_kv = *rule.q_start.shape, rule.kv_pos.shape[1]
    shape = (batch, seqlen_q, seqlen_kv)
    if 0 in shape:
        return Cover(shape)
    found: list[_Sample] = []
    for sample in range(batch):
        if sample and _same(rule, sample - 1, sample):
            found.append(found[-1])
            continue
        one = _best(rule.kv_pos[sample], *(each[sample] for each in rule.queries))
        if one is None:
            return None
        found.append(one)
    in_place = tuple(all(one.in_place[axis] for one in found) for axis in (0, 1))
    boxes = [one.boxes(in_place) for one in found]
    inner = tuple(_rectangles([inner for inner, _ in boxes], [whole for _, whole in boxes]))
    queries = None if in_place[0] else _order([one.queries for one in found], seqlen_q)
    keys = None if in_place[1] else _order([one.keys for one in found], seqlen_kv)
    counted = [
        length if order is None else order.places.shape[1]
        for order, length in ((queries, seqlen_q), (keys, seqlen_kv))
    ]
    sequences = Sequences.of(inner, (batch, counted[0], counted[1]))
    if sequences is None and not all(_few(one.inner + one.whole) for one in found):
        return None
    whole = tuple(_rectangles([whole for _, whole in boxes], [inner for inner, _ in boxes]))
    return Cover(shape, inner, whole, queries, keys, sequences)


class _Box(NamedTuple):
    """A rectangle of one sample: ranges of queries and of keys."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    causal: bool = False

    @property
    def scores(self) -> int:
        return (self.queries[1] - self.queries[0]) * (self.keys[1] - self.keys[0])


@dataclass(frozen=True, eq=False)
class _Sample:
    """A cover of one sample.

    Attributes:
        queries, keys: the places that ``inner`` counts, those of its rectangles in order.
        inner, whole: see `Cover`.
    """

    queries: Tensor
    keys: Tensor
    inner: tuple[_Box, ...]
    whole: tuple[_Box, ...]

    @cached_property
    def in_place(self) -> tuple[bool, bool]:
        """Whether all queries, and all keys, of each box lie side by side."""
        return (
            _side_by_side(self.queries, [box.queries for box in self.inner]),
            _side_by_side(self.keys, [box.keys for box in self.inner]),
        )

    def boxes(self, in_place: tuple[bool, ...]) -> tuple[list[_Box], list[_Box]]:
        """``inner`` and ``whole``, with places as they lie for an axis that is not gathered."""
        rows = _where(self.queries) if in_place[0] else _unchanged
        keys = _where(self.keys) if in_place[1] else _unchanged
        inner = [_Box(rows(box.queries), keys(box.keys), box.causal) for box in self.inner]
        return inner, list(self.whole)


def _best(position: Tensor, *of_queries: Tensor) -> _Sample | None:
    """The cheapest cover of a sample within the bound on calls."""
    order = (
        torch.arange(len(position), device="cpu")
        if _rise(position)
        else position.argsort(stable=True)
    )
    position = position[order]
    places = (torch.searchsorted(position, each.contiguous()) for each in of_queries)
    first, stop = _ranges(*places)
    sees = (first < stop).any(dim=0)
    whole = sees & (first[0] == 0) & (stop[0] == len(position))
    some_stand_apart = bool(whole.any()) and bool((sees & ~whole).any())
    found: list[tuple[int, _Sample]] = []
    for apart, sort in product((False, True) if some_stand_apart else (False,), (False, True)):
        rows = (sees & ~whole if apart else sees).nonzero()[:, 0]
        if sort:
            order_of_rows = _by_range(first[0, rows], stop[-1, rows], len(position))
            if _side_by_side(rows, [(0, len(rows))]) and _rise(order_of_rows):
                continue  # as they lie already
            rows = rows[order_of_rows]
        kept, ranges = _kept(first[:, rows], stop[:, rows], len(position))
        walls = None if sort else rows.diff() != 1
        for inner in _covers(*ranges, walls):
            boxes = tuple(_Box(r, (0, len(position))) for r in _runs(whole)) if apart else ()
            one = _Sample(rows, order[kept], inner, boxes)
            if _few(one.inner + one.whole) or _one_by_one(one):
                found.append((_cost(one), one))
    return min(found, key=lambda each: each[0])[1] if found else None


def _ranges(first: Tensor, stop: Tensor, *gap: Tensor) -> tuple[Tensor, Tensor]:
    """``first`` and ``stop`` of what each of S queries sees, ``[n, S]``: all between, or what is
    before and what is behind its gap."""
    if not gap:
        return first[None], stop[None]
    begin, end = (torch.minimum(torch.maximum(each, first), stop) for each in gap)
    cut = begin < end
    firsts = torch.stack((first, torch.where(cut, end, stop)))
    return firsts, torch.stack((torch.where(cut, begin, stop), stop))


def _covers(first: Tensor, stop: Tensor, walls: Tensor | None) -> Iterator[tuple[_Box, ...]]:
    """Covers of queries that see ``[first, stop)`` each: cut by queries, and cut by keys.

    Args:
        first, stop: ``[n, S]``, of each query, one after the other.
        walls: where a query does not lie beside the one before, so that no rectangle has both.
    """
    squares: list[_Box] = []
    by_queries: list[_Box] = []
    for segments in map(_segments, first, stop, [walls] * len(first)):
        if segments is None:
            return
        for a, b, low, high, grows in segments:
            if grows:
                squares.append(_Box((a, b), (high - 1, high - 1 + b - a), causal=True))
                high -= 1
            if low < high:
                by_queries.append(_Box((a, b), (low, high)))
    by_queries.sort()
    yield tuple(sorted(squares + by_queries))
    if len(by_queries) <= MOST_LARGE_CALLS:
        yield tuple(sorted(squares + _by_keys(by_queries)))


def _segments(
    first: Tensor, stop: Tensor, walls: Tensor | None
) -> list[tuple[int, int, int, int, bool]] | None:
    """Runs of queries that see something, with one range, or a range that grows by a key: first
    query and the one behind the last, both ends of the first one's range, and whether it grows.

    None where there are more than any cover may have.
    """
    rows = (first < stop).nonzero()[:, 0]
    if len(rows) == 0:
        return []
    first, stop = first[rows], stop[rows]
    level, growth, apart = first.diff() == 0, stop.diff(), rows.diff() != 1
    if walls is not None:
        walls = torch.nn.functional.pad(walls.cumsum(0), (1, 0))
        apart |= walls[rows].diff() != 0
    kinds = torch.full((len(first) - 1,), _BREAK, dtype=torch.int8, device="cpu")
    kinds[level & (growth == 0)] = _SAME
    kinds[level & (growth == 1)] = _GROWS
    kinds[apart] = _BREAK
    runs = [t.tolist() for t in torch.unique_consecutive(kinds, return_counts=True)]
    if sum(n if kind == _BREAK else 1 for kind, n in zip(*runs, strict=True)) > 2 * MOST_SEQUENCES:
        return None
    found: list[tuple[int, int, bool]] = []
    begun, at, now = 0, 0, _BREAK  # the segment that is open, the query that it ends with, its kind
    for kind, count in zip(*runs, strict=True):
        if kind == _BREAK:
            found.append((begun, at + 1, now == _GROWS and at > begun))
            found += [(one, one + 1, False) for one in range(at + 1, at + count)]
            begun, now = at + count, _BREAK
        elif begun == at:
            now = kind
        else:  # the query that both would have stays where it is
            found.append((begun, at + 1, now == _GROWS and at > begun))
            begun, now = at + 1, kind
        at += count
    found.append((begun, at + 1, now == _GROWS and at > begun))
    return [
        (int(rows[a]), int(rows[b - 1]) + 1, int(first[a]), int(stop[a]), grows)
        for a, b, grows in found
    ]


_BREAK, _SAME, _GROWS = 0, 1, 2


def _by_keys(boxes: Sequence[_Box]) -> list[_Box]:
    """The same pairs in rectangles of which no two share a key in part."""
    edges = sorted({edge for box in boxes for edge in box.keys})
    found: list[_Box] = []
    for low, high in pairwise(edges):
        open_run: tuple[int, int] | None = None
        for (a, b), keys, _ in boxes:
            if not (keys[0] <= low and high <= keys[1]):
                continue
            if open_run is not None and open_run[1] == a:
                open_run = (open_run[0], b)
                continue
            if open_run is not None:
                found.append(_Box(open_run, (low, high)))
            open_run = (a, b)
        if open_run is not None:
            found.append(_Box(open_run, (low, high)))
    return found


def _kept(first: Tensor, stop: Tensor, length: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The keys that are in some range, and the ranges counted in these."""
    changes = torch.zeros(length + 1, dtype=torch.int64, device="cpu")
    one = torch.ones_like(first.flatten())
    changes.index_add_(0, first.flatten(), one).index_add_(0, stop.flatten(), -one)
    seen = changes.cumsum(0)[:-1] > 0
    before = torch.cat((torch.zeros(1, dtype=torch.int64, device="cpu"), seen.cumsum(0)))
    return seen.nonzero()[:, 0], (before[first], before[stop])


def _few(boxes: Sequence[_Box]) -> bool:
    if len(boxes) <= MOST_CALLS:
        return True
    large = sum(box.scores for box in boxes) >= LARGE_CALL_SCORES * len(boxes)
    return large and len(boxes) <= MOST_LARGE_CALLS


def _one_by_one(sample: _Sample) -> bool:
    """Whether its boxes may be one launch, as `ds_lvx.kernels.cover.Sequences` has them."""
    boxes, at = sample.inner, (0, 0)
    if sample.whole or len(boxes) > MOST_SEQUENCES or len({box.causal for box in boxes}) != 1:
        return False
    for box in boxes:
        if (box.queries[0], box.keys[0]) != at:
            return False
        at = (box.queries[1], box.keys[1])
    return True


def _cost(sample: _Sample) -> int:
    """The bytes that a cover moves, and its launches, in units of a key; its products are given."""
    boxes = sample.inner + sample.whole
    cost = _CALL * (1 if _one_by_one(sample) else len(boxes))
    for box in boxes:
        others = [o for o in boxes if o is not box]
        shared = any(_meet(box.keys, o.keys) for o in others) or bool(sample.whole)
        keys = box.keys[1] - box.keys[0]
        cost += _QUERY * (box.queries[1] - box.queries[0]) + (2 if shared else 1) * keys
    in_place = sample.in_place
    cost += 0 if in_place[0] else _GATHERED_QUERY * len(sample.queries)
    return cost + (0 if in_place[1] else _GATHERED_KEY * len(sample.keys))


def _rectangles(
    by_sample: Sequence[Sequence[_Box]], others: Sequence[Sequence[_Box]]
) -> Iterator[Rectangle]:
    """Boxes of each sample, those of neighbouring samples that have the same together.

    Args:
        by_sample: the boxes.
        others: of the same samples, which have other queries, and share every key.
    """
    pairs = list(zip(by_sample, others, strict=True))
    done = 0
    for (boxes, beside), same in groupby(pairs):
        batch = slice(done, done + len(list(same)))
        done = batch.stop
        for box in boxes:
            rest = [other for other in boxes if other is not box]
            yield Rectangle(
                batch,
                slice(*box.queries),
                slice(*box.keys),
                box.causal,
                sole_queries=not any(_meet(box.queries, other.queries) for other in rest),
                sole_keys=not (beside or any(_meet(box.keys, other.keys) for other in rest)),
            )


def _order(places: Sequence[Tensor], length: int) -> Order:
    """Places of each sample, made as long as the longest by others that are in no rectangle."""
    longest = max(map(len, places))
    rows = []
    for own in places:
        free = torch.ones(length, dtype=torch.bool, device="cpu")
        free[own] = False
        rows.append(torch.cat((own, free.nonzero()[: longest - len(own), 0])))
    return Order(torch.stack(rows))


def _by_range(first: Tensor, stop: Tensor, length: int) -> Tensor:
    return (first * (length + 1) + stop).argsort(stable=True)


def _rise(values: Tensor) -> bool:
    return bool((values[1:] >= values[:-1]).all())


def _side_by_side(places: Tensor, ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether each range of places is a run of neighbours."""
    jumps = torch.zeros(len(places), dtype=torch.int64, device="cpu")
    jumps[1:] = (places.diff() != 1).cumsum(0)
    return all(a == b or int(jumps[a]) == int(jumps[b - 1]) for a, b in ranges)


def _where(places: Tensor) -> Callable[[tuple[int, int]], tuple[int, int]]:
    """From a range of places that are neighbours to where they lie."""
    return lambda each: (int(places[each[0]]), int(places[each[1] - 1]) + 1)


def _unchanged(each: tuple[int, int]) -> tuple[int, int]:
    return each


def _runs(marks: Tensor) -> list[tuple[int, int]]:
    """Ranges of what is True."""
    edges = torch.nn.functional.pad(marks.int(), (1, 1)).diff().nonzero()[:, 0].tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _meet(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _same(rule: Visibility, one: int, other: int) -> bool:
    parts = (*rule.queries, rule.kv_pos)
    return all(torch.equal(part[one], part[other]) for part in parts)
