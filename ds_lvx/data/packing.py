"""Several samples in one row of text: which, and the text of such rows.

A row is its samples' tokens, one sample behind the other, and padding up to the longest row::

    input_ids       a0 a1 a2 a3 b0 b1 b2 pad      two samples of 4 and 3 tokens
    position_ids     0  1  2  3  0  1  2   0      they start anew: so ds_lvx knows where one begins
    labels           -  -  2  3  -  1  2   -      the first of a sample is predicted by nobody

Shapes: ``B`` rows, ``T`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_lvx.data.text import IGNORED, EncodedText


def rows_of(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Which samples share a row: as few rows as the longest-first rule finds, as even as they go.

    Args:
        lengths: text tokens of each sample.
        budget: text tokens of a row; a longer sample has a row of its own.

    Returns:
        Numbers of samples by row, in order inside a row and by the rows' first.
    """
    longest_first = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    rows: list[list[int]] = []
    for number in longest_first:
        room = (row for row in rows if _tokens(row, lengths) + lengths[number] <= budget)
        fitting = next(room, None)
        if fitting is None:
            rows.append([number])
        else:
            fitting.append(number)
    even: list[list[int]] = [[] for _ in rows]
    for number in longest_first:
        min(even, key=lambda row: _tokens(row, lengths)).append(number)
    if all(len(row) == 1 or _tokens(row, lengths) <= budget for row in even):
        rows = even
    return sorted(sorted(row) for row in rows)


def _tokens(row: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[number] for number in row)


def packed_text(
    texts: Sequence[EncodedText], rows: Sequence[Sequence[int]], *, pad: int, min_tokens: int
) -> tuple[dict[str, Tensor], Tensor, list[tuple[int, slice]]]:
    """The text of rows.

    Args:
        texts: of the samples.
        rows: numbers of samples, each in one row.
        pad: token behind the last sample of a row.
        min_tokens: T at least.

    Returns:
        ``input_ids``, ``position_ids`` and ``labels`` int64 ``[B, T]``; bool ``[B, T]``, where a
        sample or the padding begins; of each sample its row and its tokens there.
    """
    length = max(min_tokens, *(sum(len(texts[n].input_ids) for n in row) for row in rows))
    shape = (len(rows), length)
    ids, labels = torch.full(shape, pad), torch.full(shape, IGNORED)
    positions, begins = torch.arange(length).repeat(len(rows), 1), torch.zeros(shape).bool()
    places: dict[int, tuple[int, slice]] = {}
    for number, row in enumerate(rows):
        start = 0
        for sample in row:
            text = texts[sample]
            here = slice(start, start + len(text.input_ids))
            ids[number, here] = torch.tensor(text.input_ids)
            labels[number, here] = torch.tensor([IGNORED, *text.labels[1:]])
            positions[number, start:] = torch.arange(length - start)
            begins[number, start] = True
            places[sample] = number, here
            start = here.stop
        begins[number, start:][:1] = True
        positions[number, start:] = torch.arange(length - start)
    text_inputs = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return text_inputs, begins, [places[n] for n in range(len(texts))]
