"""A rule of visibility, and what follows from it: found once, used by every layer of a batch.

What a kernel wants to know of a rule are *blocks*: rectangles of queries and keys of which all see
all, some see some, or none sees any. They follow from the smallest and largest position of each
block of keys. Nothing here is as large as queries times keys.

Legend: B batch, S queries, T keys, R runs of queries that follow each other and see the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from itertools import groupby, pairwise
from operator import attrgetter

import torch
from torch import Tensor

from ds_lvx.kernels.cover import Cover
from ds_lvx.kernels.covering import cover_of
from ds_lvx.kernels.lists import extremes, listed
from ds_lvx.kernels.transfer import to_device
from ds_lvx.kernels.visibility import EVERYTHING, Visibility

ALL = slice(None)
_APART = 64
"""A block ends where the next position is so far away, with as many keys or queries on each side:
a shard may have an early and a late piece of a text, of which only one is seen."""

_MOST_JUMPS = 256


class Structure(StrEnum):
    """What kind of rule it is; each kind is one of those below it, too."""

    ALL = "all visible"
    CAUSAL = "causal"
    """Query i sees keys 0 to i; as many keys as queries."""
    PACKED = "packed causal"
    """Query i sees keys from the start of its document to i."""
    STAIRCASE = "staircase"
    """Every query sees one run of neighbouring keys (or none), and the runs move forward."""
    MIXED = "mixed"


@dataclass(frozen=True)
class Block:
    """A rectangle of queries and keys that a kernel computes at once.

    ``masked`` is False where every query sees every key; ``causal``: as many queries as keys, of
    which query i sees keys 0 to i, so that a kernel may do without the mask.
    """

    queries: slice
    keys: slice
    masked: bool
    causal: bool = False


class Rule:
    """Who sees what, of some queries over some keys, and what was found out about it so far.

    Args:
        visibility: on the device that computes.
        host: the same on the CPU. Without it (a bare call on an accelerator) everything is found
            on the device, whose stream must not wait for the host: blocks then come whole, each
            with its mask, and the structure is not known.
    """

    def __init__(self, visibility: Visibility, host: Visibility | None = None) -> None:
        host = visibility if visibility.kv_pos.device.type == "cpu" else host
        if host is not None and host.has_gaps and not _has_gaps(host):
            visibility, host = visibility.without_gaps(), host.without_gaps()
        self.visibility = visibility
        self.host = host
        self._parts: dict[tuple[int, int, int, int], Rule] = {}
        self._blocks: dict[tuple[int, int, int | None], tuple[Block, ...]] = {}
        self._lists: dict[tuple[int, int, int, bool], tuple[Tensor, Tensor]] = {}

    @classmethod
    def on(cls, host: Visibility, device: torch.device) -> Rule:
        """A rule that is known on the CPU, for a device."""
        return cls(host.to(device), host)

    @property
    def shape(self) -> tuple[int, int]:
        """``(S, T)``."""
        return self.visibility.q_start.shape[1], self.visibility.kv_pos.shape[1]

    def part(self, queries: slice = ALL, keys: slice = ALL) -> Rule:
        """The rule of some queries over some keys; the same object each time."""
        seqlen_q, seqlen_kv = self.shape
        rows, columns = queries.indices(seqlen_q)[:2], keys.indices(seqlen_kv)[:2]
        if (rows, columns) == ((0, seqlen_q), (0, seqlen_kv)):
            return self
        place = (*rows, *columns)
        if place not in self._parts:
            host = None if self.host is None else self.host.part(queries, keys)
            self._parts[place] = Rule(self.visibility.part(queries, keys).contiguous(), host)
        return self._parts[place]

    @cached_property
    def sees_all(self) -> bool:
        """Whether every query sees every key; False where that is not known on the CPU."""
        rule = self.host
        if rule is None or 0 in self.shape:
            return False
        first, last = rule.kv_pos.aminmax(dim=1)
        starts, ends = rule.q_start.amax(dim=1), rule.q_end.amin(dim=1)
        return not rule.has_gaps and bool(((starts <= first) & (last < ends)).all())

    @cached_property
    def structure(self) -> Structure:
        """The first kind that fits; ``MIXED`` where the rule is not known on the CPU."""
        rule = self.host
        if rule is None:
            return Structure.MIXED
        if self.sees_all:
            return Structure.ALL
        if rule.has_gaps:
            return Structure.MIXED
        seqlen_q, seqlen_kv = self.shape
        index = torch.arange(seqlen_kv, dtype=torch.int32, device="cpu")
        if seqlen_q == seqlen_kv and bool(
            (rule.kv_pos == index).all() and (rule.q_end == index + 1).all()
        ):
            if bool((rule.q_start <= 0).all()):
                return Structure.CAUSAL
            if _rises(rule.q_start) and bool((rule.q_start <= index).all()):
                return Structure.PACKED
        if all(map(_rises, (rule.kv_pos, rule.q_start, rule.q_end))):
            return Structure.STAIRCASE
        return Structure.MIXED

    @cached_property
    def cover(self) -> Cover | None:
        """What is visible in rectangles and causal squares, for tensors on the device.

        None where it takes too many of them, or where the rule is not known on the CPU.
        """
        found = None if self.host is None else cover_of(self.host)
        return None if found is None else found.to(self.visibility.kv_pos.device)

    def blocks(
        self, *, queries_per_block: int, keys_per_block: int, most_keys: int | None = None
    ) -> tuple[Block, ...]:
        """Queries and keys in blocks, those over the same keys side by side.

        What nobody sees is left out, and the queries of a block are narrowed to the run that sees
        any of it. Masked are only those blocks of which some query does not see some key.

        Args:
            queries_per_block, keys_per_block: at most.
            most_keys: blocks without a mask become one with those beside them, of any number of
                queries and so many keys.
        """
        sizes = (queries_per_block, keys_per_block)
        name = (*sizes, most_keys)
        if name not in self._blocks:
            found = whole_blocks(*self.shape, *sizes, masked=True)
            if self.host is not None:
                found = _narrowed(self.host, *sizes)
                found = found if most_keys is None else _joined(found, most_keys)
            self._blocks[name] = found
        return self._blocks[name]

    def mask(self, block: Block) -> Tensor | None:
        """bool ``[B, queries, keys]`` of a block that needs one; lives as long as it is held."""
        return self.visibility.mask(block.queries, block.keys) if block.masked else None

    def lists(self, *, rows: int, keys: int, group: int, of_keys: bool) -> tuple[Tensor, Tensor]:
        """Which tiles of rows see which blocks of keys, as lists that a kernel walks over.

        Args:
            rows: of a tile; a query makes ``group`` neighbouring ones.
            keys: of a block.
            group: query heads of a key/value head.
            of_keys: list the tiles of each block of keys, rather than the blocks of each tile.

        Returns:
            int32 ``[B, tiles, blocks]`` (``of_keys``: ``[B, blocks, tiles]``), in which those come
            first of which all rows see all keys, then those of which some may see some; and int32
            ``[B, tiles, 2]``, how many are seen, and how many of these wholly. A tile or a block
            that is cut short is not seen wholly. On the device.
        """
        name = (rows, keys, group, of_keys)
        if name not in self._lists:
            known, device = self.host or self.visibility, self.visibility.kv_pos.device
            order, counts = listed(known, rows=rows, keys=keys, group=group, of_keys=of_keys)
            self._lists[name] = (to_device(order, device), to_device(counts, device))
        return self._lists[name]


def _has_gaps(rule: Visibility) -> bool:
    """Whether some query does not see some key because of a gap."""
    if 0 in (rule.q_start.numel(), rule.kv_pos.numel()):
        return False
    low, high = rule.kv_pos.aminmax(dim=1, keepdim=True)
    return bool(
        rule.gaps_meet(torch.maximum(low, rule.q_start), torch.minimum(high, rule.q_end - 1)).any()
    )


def whole_blocks(
    seqlen_q: int, seqlen_kv: int, queries_per_block: int, keys_per_block: int, *, masked: bool
) -> tuple[Block, ...]:
    """All queries and keys in blocks of these sizes, whoever sees what."""
    return tuple(
        Block(queries, keys, masked)
        for keys in _slices(slice(0, seqlen_kv), keys_per_block)
        for queries in _slices(slice(0, seqlen_q), queries_per_block)
    )


def _slices(piece: slice, most: int) -> list[slice]:
    """As few parts as have ``most`` at most, all but the last of one length."""
    size = _even(piece.stop - piece.start, most)
    firsts = range(piece.start, piece.stop, size)
    return [slice(first, min(first + size, piece.stop)) for first in firsts]


def _even(length: int, most: int) -> int:
    """The length of as few equal parts as have ``most`` at most, the last perhaps shorter."""
    return -(-length // max(-(-length // most), 1)) or 1


def _rises(values: Tensor) -> bool:
    return bool((values[:, 1:] >= values[:, :-1]).all())


def _narrowed(rule: Visibility, queries_per_block: int, keys_per_block: int) -> tuple[Block, ...]:
    """See `Rule.blocks`."""
    seqlen_q, seqlen_kv = rule.q_start.shape[1], rule.kv_pos.shape[1]
    if 0 in (seqlen_q, seqlen_kv):
        return ()
    pieces = _pieces(rule.kv_pos)
    slices = [part for piece in pieces for part in _slices(piece, keys_per_block)]
    bounds = [
        extremes(rule.kv_pos[:, piece], _even(piece.stop - piece.start, keys_per_block))
        for piece in pieces
    ]
    low, high = (torch.cat(each, dim=1)[:, None] for each in zip(*bounds, strict=True))
    of_rows = [part for piece in _pieces(rule.q_end) for part in _slices(piece, queries_per_block)]
    begins = {part.start for part in of_rows}
    starts = _starts_of_runs(rule, begins)
    start, end, *gap = (each[:, starts, None] for each in rule.queries)
    some = (start <= high) & (low < end) & (start < end)
    every = (start <= low) & (high < end)
    if gap:
        some &= (low < gap[0]) | (gap[1] <= high)
        every &= (high < gap[0]) | (gap[1] <= low) | (gap[1] <= gap[0])
    sees_some, sees_all = some.any(dim=0), every.all(dim=0)  # [R, blocks]
    stops = [*starts[1:].tolist(), seqlen_q]
    firsts = starts.tolist()
    rows = [i for i, first in enumerate(firsts) if first in begins]
    by_rows = [
        _runs_of_blocks(sees_some[i:j], sees_all[i:j], i)
        for i, j in zip(rows, [*rows[1:], len(firsts)], strict=True)
    ]
    found = (
        (slice(firsts[run[0]], stops[run[1]]), keys, not run[2])
        for number, keys in enumerate(slices)
        for runs in by_rows
        if (run := runs[number])[0] >= 0
    )
    return tuple(
        Block(queries, keys, masked, causal=masked and _is_causal(rule, queries, keys))
        for queries, keys, masked in found
    )


def _is_causal(rule: Visibility, queries: slice, keys: slice) -> bool:
    """Whether these are a square, of which query i sees keys 0 to i."""
    if queries.stop - queries.start != keys.stop - keys.start:
        return False
    start, end, position = rule.q_start[:, queries], rule.q_end[:, queries], rule.kv_pos[:, keys]
    return (
        bool((end[:, :-1] <= position[:, 1:]).all())
        and bool((position < end).all())
        and bool((start <= position[:, :1]).all())
        and not bool(rule.part(queries, keys).gaps_meet(position[:, :1], position[:, -1:]).any())
    )


def _joined(blocks: Sequence[Block], most_keys: int) -> tuple[Block, ...]:
    """See `Rule.blocks`."""
    by_keys: list[list[Block]] = []
    for keys, group in groupby(blocks, key=attrgetter("keys")):
        own: list[Block] = []
        for block in group:
            last = own[-1] if own else block
            if last.masked or block.masked or last.queries.stop != block.queries.start:
                own.append(block)
            else:
                own[-1] = replace(last, queries=slice(last.queries.start, block.queries.stop))
        before = by_keys[-1] if by_keys else own
        first = before[0].keys.start
        whole = not any(block.masked for block in (*before, *own))
        same = whole and [b.queries for b in before] == [b.queries for b in own]
        if same and before[0].keys.stop == keys.start and keys.stop - first <= most_keys:
            by_keys[-1] = [replace(block, keys=slice(first, keys.stop)) for block in own]
        else:
            by_keys.append(own)
    return tuple(block for own in by_keys for block in own)


def _pieces(values: Tensor) -> list[slice]:
    """What lies between positions ``[B, length]`` that are far apart; see `_APART`."""
    length = values.shape[1]
    apart = values.diff(dim=1).abs_() > _APART
    places = apart.any(dim=0).nonzero()[:, 0]
    apart = apart[:, places]
    for beside in (places, places + 1):  # padding may stand anywhere
        apart &= (values[:, beside] >= 0) & (values[:, beside] != EVERYTHING)
    ends = [0]
    jumps = (places[apart.any(dim=0)] + 1).tolist()
    for end in jumps if len(jumps) <= _MOST_JUMPS else ():  # else positions are in no order
        if end - ends[-1] >= _APART <= length - end:
            ends.append(end)
    return [slice(*each) for each in pairwise([*ends, length])]


def _starts_of_runs(rule: Visibility, blocks: Collection[int]) -> Tensor:
    """Where queries begin that see something else than the one before, or a block."""
    seqlen = rule.q_start.shape[1]
    begins = torch.zeros(seqlen, dtype=torch.bool, device="cpu")
    begins[[*blocks]] = True
    for ranges in rule.queries:
        begins[1:] |= (ranges[:, 1:] != ranges[:, :-1]).any(dim=0)
    return begins.nonzero()[:, 0]


def _runs_of_blocks(some: Tensor, every: Tensor, offset: int) -> list[tuple[int, int, bool]]:
    """For each block of keys the first and last run that sees some of it, and whether all see all.

    Args:
        some, every: bool ``[R, blocks]``.
        offset: added to the numbers of runs; a block that nobody sees has -1.
    """
    runs = len(some)
    marks = some.to(torch.uint8)
    first = marks.argmax(dim=0)
    last = runs - 1 - marks.flip(0).argmax(dim=0)
    before = torch.zeros(1, every.shape[1], dtype=torch.int32, device="cpu")
    seen = torch.cat((before, every.cumsum(dim=0, dtype=torch.int32)))
    within = seen.gather(0, last[None] + 1) - seen.gather(0, first[None])
    whole = (within[0] == last - first + 1).tolist()
    first = torch.where(some.any(dim=0), first + offset, -1)
    return list(zip(first.tolist(), (last + offset).tolist(), whole, strict=True))
