from __future__ import annotations

import pytest
import torch

from ds_lvx.data.packing import packed_text, rows_of
from ds_lvx.data.text import IGNORED, EncodedText


@pytest.mark.parametrize(
    ("lengths", "budget", "rows"),
    [
        ([5, 3, 2], 10, [[0, 1, 2]]),
        ([4, 4, 4, 4], 9, [[0, 2], [1, 3]]),
        ([9, 1, 1, 7], 10, [[0], [1, 2, 3]]),  # not 10 and 8
        ([2, 30, 3], 10, [[0, 2], [1]]),  # one that is too long has its own row
        ([6, 5, 4, 3, 2], 10, [[0, 2], [1, 3, 4]]),
        ([7], 3, [[0]]),
    ],
)
def test_which_samples_share_a_row(lengths: list[int], budget: int, rows: list[list[int]]) -> None:
    assert rows_of(lengths, budget) == rows


def test_rows_hold_every_sample_once_within_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 40):
        lengths = torch.randint(1, 300, (count,), generator=generator).tolist()
        rows = rows_of(lengths, 256)
        assert sorted(n for row in rows for n in row) == [*range(count)]
        for row in rows:
            assert len(row) == 1 or sum(lengths[n] for n in row) <= 256
        assert len(rows) <= max(2 * sum(lengths) / 256 + 1, 1)


def test_positions_start_anew_and_nobody_learns_a_first_token() -> None:
    texts = [EncodedText([*range(n, 2 * n)], [*range(n, 2 * n)]) for n in (4, 3, 5)]
    made, begins, places = packed_text(texts, [[0, 1], [2]], pad=99, min_tokens=9)
    no = IGNORED
    assert made["input_ids"].tolist() == [
        [4, 5, 6, 7, 3, 4, 5, 99, 99],
        [5, 6, 7, 8, 9, 99, 99, 99, 99],
    ]
    assert made["position_ids"].tolist() == [
        [0, 1, 2, 3, 0, 1, 2, 0, 1],
        [0, 1, 2, 3, 4, 0, 1, 2, 3],
    ]
    assert made["labels"].tolist() == [
        [no, 5, 6, 7, no, 4, 5, no, no],
        [no, 6, 7, 8, 9, no, no, no, no],
    ]
    assert begins.nonzero().tolist() == [[0, 0], [0, 4], [0, 7], [1, 0], [1, 5]]
    assert places == [(0, slice(0, 4)), (0, slice(4, 7)), (1, slice(0, 5))]
