"""Rows that begin alike as one row: what they begin with once, and the rest of each behind it::

    p p p p a a          p p p p a a b b b       b sees p and b, not a
    p p p p b b b   ->

The completions of a prompt, or a chosen and a rejected answer, then run its text and its images
once. A token computes what it did in its own row: it keeps its position, and sees the same tokens.
The last token that rows have in common stays with each, since the next token differs. So does what
is learnt, which would count once where it counts for every row.

Legend: ``B`` rows as they came, ``T`` tokens of one; ``b`` rows and ``t`` tokens of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ds_lvx.models.concatenated.batch import Branches, Sequences, Unit
from ds_lvx.models.concatenated.deal import TEXT
from ds_lvx.models.text import IGNORED_LABEL

_LEAST = 1 / 8
"""Of a row's tokens: fewer in common are not worth a row that is no plain causal text any more."""

_THREADS = 8


def share(text: Sequences, pixels: Mapping[str, Tensor]) -> Sequences:
    """The same text with rows that begin alike as one; itself where there are none.

    Args:
        text: rows as they came, before they are dealt.
        pixels: of all units by source, one after the other: units are alike whose pixels are.
    """
    rows = _Rows.of(text, pixels) if text.number.numel() > 0 else None
    if rows is None:
        return text
    groups = [_Group([row], text.shape[1]) for row in range(text.shape[0])]  # of each row
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
    found = [group for row, group in enumerate(groups) if group.rows[0] == row]
    return text if len(found) == len(groups) else _merged(text, found)


class _Group(NamedTuple):
    """Rows that become one, and at how many places they are the same at their beginning."""

    rows: list[int]
    common: int


@dataclass(frozen=True, eq=False)
class _Rows:
    """What is compared of rows.

    Attributes:
        columns: int64 or of another dtype ``[B, T]`` each, in which common tokens are the same.
        said: int64 ``[B, T]``, tokens up to each that are no padding.
        learnt: bool ``[B, T]``, tokens whose next one is learnt.
        ends: int64 ``[B, T]``, one past the last place that belongs to what a token is of.
    """

    columns: list[Tensor]
    said: Tensor
    learnt: Tensor
    ends: Tensor

    @classmethod
    def of(cls, text: Sequences, pixels: Mapping[str, Tensor]) -> _Rows | None:
        """None where pixels are not those of the units, which is an error of another's to tell."""
        alike = _alike(text.units, pixels)
        if alike is None:
            return None
        number = text.number  # its last, `TEXT`, is that of text in what has one for each unit
        columns, said = [text.input_ids, alike[number]], torch.ones_like(number)
        if text.attention_mask is not None:
            columns.append(text.attention_mask)
            said = ((text.attention_mask != 0) | (number != TEXT)).long()
        if text.position_ids is not None:
            columns += text.position_ids.expand(1, *text.position_ids.shape).flatten(0, -3)
        behind = torch.arange(1, text.shape[1] + 1).expand(text.shape)
        last = torch.zeros_like(alike).scatter_reduce(
            0, (number % len(alike)).flatten(), behind.flatten(), "amax"
        )
        ends = torch.where(number == TEXT, behind, last[number])
        for each in (text.ends, text.recent_ends):
            if each is not None:
                columns.append(each)
                ends = torch.maximum(ends, each)
        learnt = torch.zeros(text.shape, dtype=torch.bool)
        if text.labels is not None:
            learnt[:, :-1] = text.labels[:, 1:] != IGNORED_LABEL
        return cls(columns, said.cumsum(dim=1), learnt, ends)

    def saved(self, group: _Group) -> int:
        """Tokens that need not run again."""
        if group.common == 0:
            return 0
        return int(self.said[group.rows[0], group.common - 1]) * (len(group.rows) - 1)

    def common(self, one: int, other: int) -> int:
        """Places that two rows may share, at their beginning, without cutting a unit, or what
        sees itself."""
        differs = torch.stack([each[one] != each[other] for each in self.columns]).any(dim=0)
        if bool(differs[0]):
            return 0
        apart = differs[1:] | (self.learnt[one] | self.learnt[other])[:-1]
        common = int(apart.int().argmax()) if bool(apart.any()) else len(apart)
        while common > 0 and bool((cut := self.ends[one, :common] > common).any()):
            common = int(cut.int().argmax())
        return common


def _alike(units: Sequence[Unit], pixels: Mapping[str, Tensor]) -> Tensor | None:
    """int64 ``[units + 1]``: of each unit, the first one that is the same at its place of a row;
    `TEXT` behind the last. None where pixels are not those of the units."""
    at = dict.fromkeys(pixels, 0)
    each: list[tuple[tuple[int, Unit], Tensor]] = []
    for _, of_row in groupby(units, key=lambda unit: unit.row):
        for place, unit in enumerate(of_row):
            if unit.source not in pixels:
                return None
            start = at[unit.source]
            at[unit.source] += unit.rows
            own = pixels[unit.source][start : at[unit.source]]
            each.append(((place, replace(unit, row=0)), own))
    if any(len(pixels[key]) != rows for key, rows in at.items()):
        return None
    # Images that differ mostly do from their first pixels on; all others are read by some threads.
    found = _firsts(each, _begin_alike)
    firsts, owns = [each[first][1] for first in found], [own for _, own in each]
    with ThreadPoolExecutor(_THREADS) as pool:
        if not all(pool.map(_same, firsts, owns)):
            found = _firsts(each, _same)
    return torch.tensor([*found, TEXT])


def _firsts(
    units: Sequence[tuple[Hashable, Tensor]], alike: Callable[[Tensor, Tensor], bool]
) -> list[int]:
    """Of each unit, the number of the first one of its kind with such pixels."""
    known: dict[Hashable, list[int]] = {}
    found = []
    for number, (kind, own) in enumerate(units):
        before = known.setdefault(kind, [])
        first = next((n for n in before if alike(units[n][1], own)), number)
        if first == number:
            before.append(number)
        found.append(first)
    return found


def _begin_alike(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one[:1], other[:1])


def _same(one: Tensor, other: Tensor) -> bool:
    if one.data_ptr() == other.data_ptr():
        return True
    pair = one.flatten(), other.flatten()
    size = one.element_size()
    if all(size * each.numel() % 8 == size * each.storage_offset() % 8 == 0 for each in pair):
        # As long words, which a CPU compares at the speed of its memory.
        pair = pair[0].view(torch.int64), pair[1].view(torch.int64)
    return torch.equal(*pair)


def _merged(text: Sequences, groups: Sequence[_Group]) -> Sequences:
    """Every group as a row, without what pads the end of each of its rows."""
    lengths = _lengths(text)
    own = [[max(lengths[row], each.common) for row in each.rows] for each in groups]
    longest = max(
        g.common + sum(n - g.common for n in ns) for g, ns in zip(groups, own, strict=True)
    )
    index = torch.full((len(groups), longest), -1)  # where each token came from, in [B * T]
    shift = torch.zeros_like(index)  # how far it went to the right
    gaps = torch.zeros(2, len(groups), longest, dtype=torch.int64)
    unmerged = torch.full(text.shape, -1)
    starts: list[list[int]] = []
    for place, group in enumerate(groups):
        begins: list[int] = []
        common = at = group.common
        for row, length in zip(group.rows, own[place], strict=True):
            first, by = common if begins else 0, at - common
            here = place, slice(first + by, length + by)
            index[here] = row * text.shape[1] + torch.arange(first, length)
            shift[here] = by
            if begins:
                gaps[0][here], gaps[1][here] = common, at
            unmerged[row, :length] = place * longest + torch.arange(length)
            unmerged[row, first:length] += by
            begins.append(at)
            at += length - common
        starts.append(begins)
    pads = index < 0

    def taken(tensor: Tensor, fill: int) -> Tensor:
        flat = tensor.expand(*tensor.shape[:-2], *text.shape).flatten(-2)
        return flat[..., index.clamp(min=0)].masked_fill(pads, fill)

    def moved(ends: Tensor | None) -> Tensor | None:
        return None if ends is None else taken(ends, 0) + shift

    number, kept, units = _units_of(text, taken(text.number, TEXT))
    mask, positions = text.attention_mask, text.position_ids
    if mask is None and bool(pads.any()):
        mask = torch.ones(text.shape, dtype=torch.int64)
    if positions is None:
        positions = torch.arange(text.shape[1]).expand(text.shape)
    return replace(
        text,
        input_ids=taken(text.input_ids, int(text.input_ids[0, 0])),
        attention_mask=None if mask is None else taken(mask, 0),
        position_ids=taken(positions, 0),
        labels=None if text.labels is None else taken(text.labels, IGNORED_LABEL),
        units=units,
        number=number,
        ends=moved(text.ends),
        recent_ends=moved(text.recent_ends),
        branches=Branches(gaps[0], gaps[1], starts, unmerged, text.units, kept),
    )


def _lengths(text: Sequences) -> list[int]:
    """Of each row up to its last token that is no padding, or whose label counts."""
    if text.attention_mask is None:
        return [text.shape[1]] * text.shape[0]
    kept = (text.attention_mask != 0) | (text.number != TEXT)
    if text.labels is not None:
        kept |= text.labels != IGNORED_LABEL
    return [int(row.nonzero()[-1, 0]) + 1 if bool(row.any()) else 0 for row in kept]


def _units_of(text: Sequences, number: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[Unit, ...]]:
    """Units by the rows that have them now, and which of the text's these are.

    Args:
        number: int64 ``[b, t]``, with the numbers of the text's.
    """
    kept: dict[int, int] = {}  # and the row that has it
    for row, of_row in enumerate(number):
        for unit in of_row[of_row != TEXT].unique_consecutive().tolist():
            kept.setdefault(unit, row)
    anew = torch.full((len(text.units) + 1,), TEXT)  # the last is of text
    anew[[*kept]] = torch.arange(len(kept))
    return anew[number], tuple(kept), tuple(replace(text.units[n], row=r) for n, r in kept.items())
