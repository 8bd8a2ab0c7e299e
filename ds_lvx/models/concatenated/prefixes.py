"""Rows that begin alike as one, where images stand among the text: `ds_lvx.models.prefixes`.

Units of the rows are alike whose pixels are; none is cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from ds_lvx.models.concatenated.batch import Sequences, Unit
from ds_lvx.models.concatenated.deal import TEXT
from ds_lvx.models.prefixes import alike


def share(
    text: Sequences,
    pixels: Mapping[str, Tensor],
    together: Sequence[int] | None = None,
) -> Sequences:
    """The same text with rows that begin alike as one; itself where there are none.

    Args:
        text: rows as they came, before they are dealt.
        pixels: of all units by source, one after the other: units are alike whose pixels are.
        together: `ds_lvx.models.prefixes.TOGETHER`, where pixels are this rank's.
    """
    if text.number.numel() == 0:
        return text
    firsts = _firsts(text.units, pixels) if together is None else _named(text.units, together)
    if firsts is None:
        return text
    # The last number, `TEXT`, is that of text in what has one for each unit.
    number, of_unit = text.number, torch.tensor([*firsts, TEXT])
    columns, present = [of_unit[number]], torch.ones(text.shape, dtype=torch.bool)
    if text.attention_mask is not None:
        present = (text.attention_mask != 0) | (number != TEXT)
    behind = torch.arange(1, text.shape[1] + 1).expand(text.shape)
    last = torch.zeros_like(of_unit).scatter_reduce(
        0, (number % len(of_unit)).flatten(), behind.flatten(), "amax"
    )
    ends = torch.where(number == TEXT, behind, last[number])
    for each in (text.ends, text.recent_ends):
        if each is not None:
            columns.append(each)
            ends = torch.maximum(ends, each)
    rows = text.alike(columns, present=present, ends=ends, together=together)
    if rows is None:
        return text
    joined = text.joined(rows)
    return joined if together is None else replace(joined, kept=None)  # pixels are of these units


def _named(units: Sequence[Unit], together: Sequence[int]) -> list[int]:
    """As `_firsts`, of units that are the same where rows are together."""
    known: dict[tuple[int, int], int] = {}
    found = []
    for row, of_row in groupby(enumerate(units), key=lambda each: each[1].row):
        for place, (number, _) in enumerate(of_row):
            found.append(known.setdefault((together[row], place), number))
    return found


def _firsts(units: Sequence[Unit], pixels: Mapping[str, Tensor]) -> list[int] | None:
    """Of each unit, the number of the first one that is the same at its place of a row. None where
    pixels are not those of the units, which is an error of another's to tell."""
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
    return alike(each)
