"""Which tiles of rows see which blocks of keys, as lists that a kernel walks over.

Legend: B batch, N lists, M places of a list.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ds_lvx.kernels.visibility import Visibility

_INT32 = torch.iinfo(torch.int32)


class _Bounds(NamedTuple):
    """Of tiles ``[B, tiles]`` and of blocks ``[B, blocks]``, int32."""

    first: Tensor  # position that some row of a tile may see
    last: Tensor  # behind all that some row may see
    latest: Tensor  # start of the rows of a tile; the largest number for one that is cut short
    earliest: Tensor  # end of the rows
    low: Tensor  # position in a block
    high: Tensor  # likewise
    highest: Tensor  # `high`; the largest number for a block that is cut short
    gaps: tuple[Tensor, ...] = ()  # of tiles; see `_gaps`

    @classmethod
    def of(cls, rule: Visibility, *, rows: int, keys: int, group: int) -> _Bounds:
        queries = rule.queries
        if rows % group == 0:  # the rows of a query are of one tile
            rows //= group
        else:
            queries = tuple(t.repeat_interleave(group, dim=1) for t in queries)
        start, end, *gaps = queries
        blind = start >= end
        first, _ = extremes(start.masked_fill(blind, _INT32.max), rows)
        _, last = extremes(end.masked_fill(blind, _INT32.min), rows)
        _, latest = extremes(start, rows)
        earliest, _ = extremes(end, rows)
        low, high = extremes(rule.kv_pos, keys)
        highest = high.clone()
        if start.shape[1] % rows:
            latest[:, -1] = _INT32.max
        if rule.kv_pos.shape[1] % keys:
            highest[:, -1] = _INT32.max
        found = _gaps(*gaps, blind=blind, rows=rows) if gaps else ()
        return cls(first, last, latest, earliest, low, high, highest, found)

    def meet(self, *, of_keys: bool) -> tuple[Tensor, Tensor]:
        """Two bool ``[B, N, M]``: whether some row may see some key, and whether all see all."""
        of_tiles, of_blocks = (1, 2) if of_keys else (2, 1)  # where each is the same
        first, last, latest, earliest = (t.unsqueeze(of_tiles) for t in self[:4])
        low, high, highest = (t.unsqueeze(of_blocks) for t in self[4:7])
        some, every = high >= first, low >= latest
        some &= low < last
        every &= highest < earliest
        if self.gaps:
            all_from, all_to, some_from, some_to = (t.unsqueeze(of_tiles) for t in self.gaps)
            some &= (low < all_from) | (high >= all_to)
            every &= (high < some_from) | (low >= some_to)
        return some, every

    def distinct(self) -> tuple[_Bounds, Tensor]:
        """The same with one of the blocks that follow each other and have the same keys' positions,
        as those inside of a frame, and int64 ``[blocks]``: which one it is for each."""
        changes = torch.zeros(self.low.shape[1], dtype=torch.bool, device="cpu")
        for each in self[4:7]:
            changes[1:] |= (each[:, 1:] != each[:, :-1]).any(dim=0)
        changes[:1] = True
        places = changes.nonzero()[:, 0]
        low, high, highest = (each[:, places] for each in self[4:7])
        return self._replace(low=low, high=high, highest=highest), changes.cumsum(0) - 1


def _gaps(start: Tensor, end: Tensor, *, blind: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Of tiles, int32 ``[B, tiles]``: first and last position of the gap that all its rows share,
    but for blind ones, and of what holds the gaps of all; each last one is behind it."""
    _, all_from = extremes(start.masked_fill(blind, _INT32.min), rows)
    all_to, _ = extremes(end.masked_fill(blind, _INT32.max), rows)
    empty = start >= end
    some_from, _ = extremes(start.masked_fill(empty, _INT32.max), rows)
    _, some_to = extremes(end.masked_fill(empty, _INT32.min), rows)
    return all_from, all_to, some_from, some_to


def listed(
    rule: Visibility, *, rows: int, keys: int, group: int, of_keys: bool
) -> tuple[Tensor, Tensor]:
    """See `ds_lvx.kernels.rule.Rule.lists`; on the device of the rule."""
    bounds = _Bounds.of(rule, rows=rows, keys=keys, group=group)
    if not rule.kv_pos.is_cpu:  # whose stream would wait for a number
        return _sorted(*bounds.meet(of_keys=of_keys))
    bounds, which = bounds.distinct()
    some, every = bounds.meet(of_keys=of_keys)
    if of_keys:
        order, counts = _of_marks(some, every)
        return order.index_select(1, which), counts.index_select(1, which)
    return _of_marks(some.index_select(2, which), every.index_select(2, which))


def _sorted(some: Tensor, every: Tensor) -> tuple[Tensor, Tensor]:
    counts = torch.stack([t.sum(dim=2, dtype=torch.int32) for t in (some, every)], dim=2)
    rank = some.to(torch.int8) + every
    return rank.argsort(dim=2, descending=True, stable=True).to(torch.int32), counts


def _of_marks(some: Tensor, every: Tensor) -> tuple[Tensor, Tensor]:
    """Lists of the places where ``every``, then of those where only ``some`` is True."""
    order = torch.zeros(some.shape, dtype=torch.int32, device="cpu").flatten(0, 1)
    wholly = _list_into(order, every, torch.zeros(len(order), dtype=torch.int64, device="cpu"))
    seen = wholly + _list_into(order, some ^ every, wholly)
    counts = torch.stack((seen, wholly), dim=1).to(torch.int32)
    return order.view(some.shape), counts.view(*some.shape[:2], 2)


def _list_into(order: Tensor, marks: Tensor, behind: Tensor) -> Tensor:
    """Write the places that are True into their list, behind so many others; how many they are."""
    which, place = marks.flatten(0, 1).nonzero(as_tuple=True)
    own = which.bincount(minlength=len(order))
    number = torch.arange(len(which), device="cpu") + (behind + own - own.cumsum(0))[which]
    order[which, number] = place.to(torch.int32)
    return own


def extremes(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each run of ``size`` values, ``[B, runs]``."""
    batch, length = values.shape
    whole = length // size * size
    runs = values[:, :whole].unflatten(1, (-1, size)) if whole else values.new_empty(batch, 0, size)
    low, high = runs.amin(dim=2), runs.amax(dim=2)
    if whole == length:
        return low, high
    least, most = values[:, whole:].aminmax(dim=1, keepdim=True)
    return torch.cat((low, least), dim=1), torch.cat((high, most), dim=1)
