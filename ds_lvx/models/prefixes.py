"""Rows that begin alike as one row: what they begin with once, and the rest of each behind it::

    p p p p a a          p p p p a a b b b       b sees p and b, not a
    p p p p b b b   ->

The completions of a prompt, or a chosen and a rejected answer, then run its text and its images
once. A token computes what it did in its own row: it keeps its position, and sees the same tokens.
What is learnt stays with each row, since it would count once where it counts for every row. So does
the last token that rows have in common, whose next one differs, where a trainer may ask how likely
that is: not in fine-tuning (`TOGETHER`), whose loss is that of the labels alone.

Legend: ``B`` rows as they came, ``T`` tokens of one; ``b`` rows and ``t`` tokens of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

_LEAST = 1 / 8
"""Of a row's tokens: fewer in common are not worth a row that is no plain causal text any more."""

_THREADS = 8

TOGETHER = "rows_together"
"""In a batch of local frames: of each row, the number of the first one whose beginning it shares
with all of its images. Pixels are of those first ones."""


@dataclass(frozen=True, eq=False)
class Branches:
    """What several rows had in common, and where each goes on behind it.

    Attributes:
        gap_start, gap_end: int64 ``[b, t]``, places of others' between, which a token does not see;
            0 of one that sees all before it.
        starts: of each row, where its branches begin, the first behind what they have in common.
        unmerged: int64 ``[B, T]``, of each token of the rows as they came its place in
            ``[b * t]``; -1 of padding that is not there.
    """

    gap_start: Tensor
    gap_end: Tensor
    starts: Sequence[Sequence[int]]
    unmerged: Tensor


@dataclass(frozen=True, eq=False)
class Merge:
    """Which rows become one, and how.

    Attributes:
        firsts: of each row, the first of those that it is made of, ascending.
        index: int64 ``[b, t]``, where each token came from, in ``[B * T]``; -1 of what pads.
        shift: int64 ``[b, t]``, how far it went to the right.
        branches: of the rows.
    """

    firsts: list[int]
    index: Tensor
    shift: Tensor
    branches: Branches

    @property
    def pads(self) -> Tensor:
        """bool ``[b, t]``, places behind the last token of a row."""
        return self.index < 0

    def taken(self, tensor: Tensor, fill: int) -> Tensor:
        """What there is of each token, ``[..., b, t]``, of ``[..., B or 1, T]``."""
        rows = tensor.expand(*tensor.shape[:-2], *self.branches.unmerged.shape).flatten(-2)
        return rows[..., self.index.clamp(min=0)].masked_fill(self.pads, fill)


def find(
    columns: Sequence[Tensor],
    *,
    present: Tensor,
    learnt: Tensor,
    kept: Tensor,
    ends: Tensor | None = None,
    together: Sequence[int] | None = None,
) -> Merge | None:
    """Rows that are to be one; None where there are none.

    Args:
        columns: of any dtype, ``[B, T]`` each, in which common tokens are the same; on the CPU.
        present: bool ``[B, T]``, tokens that are no padding.
        learnt: bool ``[B, T]``, tokens whose next one is learnt.
        kept: bool ``[B, T]``, tokens up to whose last one a row is kept.
        ends: int64 ``[B, T]``, one past the last place that belongs to what a token is of, and must
            be common with it; None: tokens are by themselves.
        together: `TOGETHER`, where it is known; None: those with most in common.

    Raises:
        ValueError: rows that are said to be together have nothing in common.
    """
    rows = _Rows(columns, present.long().cumsum(dim=1), learnt, ends)
    count, length = present.shape
    found = _known(rows, together, length) if together is not None else _found(rows, count, length)
    if len(found) == count:
        return None
    lengths = [int(row.nonzero()[-1, 0]) + 1 if bool(row.any()) else 0 for row in kept]
    return _merge(found, lengths, (count, length))


class _Group(NamedTuple):
    """Rows that become one, and at how many places they are the same at their beginning."""

    rows: list[int]
    common: int


def _known(rows: _Rows, together: Sequence[int], length: int) -> list[_Group]:
    groups = []
    for first in sorted({*together}):
        others = [row for row, of in enumerate(together) if of == first and row != first]
        pairs = [rows.common(first, row, same_next=False) for row in others]
        common = min(pairs, default=length)
        if common == 0:
            raise ValueError(
                f"got {TOGETHER} {[*together]}, by which rows {[first, *others]} begin alike with "
                "all of their images; expected it of rows that do: leave it out"
            )
        groups.append(_Group([first, *others], common))
    return groups


def _found(rows: _Rows, count: int, length: int) -> list[_Group]:
    groups = [_Group([row], length) for row in range(count)]  # of each row
    # Those with most in common first: all rows may begin alike, and those of a prompt go on so.
    pairs = [(rows.common(*pair), pair) for pair in combinations(range(len(groups)), 2)]
    for common, (row, other) in sorted(pairs, key=lambda each: -each[0]):
        parts = groups[row], groups[other]
        if parts[0] is parts[1]:
            continue
        both = sorted(parts[0].rows + parts[1].rows)
        joined = _Group(both, min(common, parts[0].common, parts[1].common))
        saved = rows.saved(joined) - sum(map(rows.saved, parts))
        if saved > _LEAST * int(rows.said[other, -1]):
            groups = [joined if n in both else group for n, group in enumerate(groups)]
    return [group for row, group in enumerate(groups) if group.rows[0] == row]


@dataclass(frozen=True, eq=False)
class _Rows:
    """What is compared of rows.

    Attributes:
        columns, learnt, ends: see `find`.
        said: int64 ``[B, T]``, tokens up to each that are no padding.
    """

    columns: Sequence[Tensor]
    said: Tensor
    learnt: Tensor
    ends: Tensor | None

    def saved(self, group: _Group) -> int:
        """Tokens that need not run again."""
        if group.common == 0:
            return 0
        return int(self.said[group.rows[0], group.common - 1]) * (len(group.rows) - 1)

    def common(self, one: int, other: int, *, same_next: bool = True) -> int:
        """Places that two rows may share, at their beginning, without cutting what belongs
        together.

        Args:
            same_next: only those whose next one is the same, learnt or not.
        """
        differs = torch.stack([each[one] != each[other] for each in self.columns]).any(dim=0)
        if bool(differs[0]):
            return 0
        apart = differs[1:] if same_next else differs[:-1]
        apart = apart | (self.learnt[one] | self.learnt[other])[:-1]
        common = int(apart.int().argmax()) if bool(apart.any()) else len(apart)
        while self.ends is not None and common > 0:
            cut = (self.ends[[one, other], :common] > common).any(dim=0)
            if not bool(cut.any()):
                break
            common = int(cut.int().argmax())
        return common


def _merge(groups: Sequence[_Group], lengths: Sequence[int], shape: tuple[int, int]) -> Merge:
    """Every group as a row, without what pads the end of each of its rows.

    Args:
        groups: by their first rows.
        lengths: of the rows as they came.
        shape: ``(B, T)``.
    """
    own = [[max(lengths[row], each.common) for row in each.rows] for each in groups]
    longest = max(
        g.common + sum(n - g.common for n in ns) for g, ns in zip(groups, own, strict=True)
    )
    index = torch.full((len(groups), longest), -1)
    shift = torch.zeros_like(index)
    gaps = torch.zeros(2, len(groups), longest, dtype=torch.int64)
    unmerged = torch.full(shape, -1)
    starts: list[list[int]] = []
    for place, group in enumerate(groups):
        begins: list[int] = []
        common = at = group.common
        for row, length in zip(group.rows, own[place], strict=True):
            first, by = common if begins else 0, at - common
            here = place, slice(first + by, length + by)
            index[here] = row * shape[1] + torch.arange(first, length)
            shift[here] = by
            if begins:
                gaps[0][here], gaps[1][here] = common, at
            unmerged[row, :length] = place * longest + torch.arange(length)
            unmerged[row, first:length] += by
            begins.append(at)
            at += length - common
        starts.append(begins)
    firsts = [group.rows[0] for group in groups]
    return Merge(firsts, index, shift, Branches(gaps[0], gaps[1], starts, unmerged))


def alike(each: Sequence[tuple[Hashable, Tensor]]) -> list[int]:
    """Of each, the number of the first one of its kind with such values; of those that require a
    gradient, in the same memory.

    Args:
        each: a kind, and values, whose shapes are the same where the kind is.
    """
    # Images that differ mostly do from their first pixels on; all others are read by some threads.
    found = _firsts(each, _begin_alike)
    firsts, owns = [each[first][1] for first in found], [own for _, own in each]
    with ThreadPoolExecutor(_THREADS) as pool:
        if not all(pool.map(_same, firsts, owns)):
            found = _firsts(each, _same)
    return found


def _firsts(
    each: Sequence[tuple[Hashable, Tensor]], same: Callable[[Tensor, Tensor], bool]
) -> list[int]:
    known: dict[Hashable, list[int]] = {}
    found = []
    for number, (kind, own) in enumerate(each):
        before = known.setdefault(kind, [])
        first = next((n for n in before if same(each[n][1], own)), number)
        if first == number:
            before.append(number)
        found.append(first)
    return found


def _begin_alike(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one[:1], other[:1])


def _same(one: Tensor, other: Tensor) -> bool:
    if one.data_ptr() == other.data_ptr():
        return True
    if one.requires_grad or other.requires_grad:
        return False  # each has a gradient of its own
    pair = one.contiguous().flatten(), other.contiguous().flatten()
    size = one.element_size()
    if all(size * each.numel() % 8 == size * each.storage_offset() % 8 == 0 for each in pair):
        # As long words, which a CPU compares at the speed of its memory.
        pair = pair[0].view(torch.int64), pair[1].view(torch.int64)
    return torch.equal(*pair)
