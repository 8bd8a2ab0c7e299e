"""Positions of text and frames, and who gets which frame."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_lvx.models.moss_vl.grid import Grid, frame_positions, text_positions
from tests.models.moss_vl_double_places import xrope

Frames = list[tuple[int, int]]


def positions(ids: list[int], frames: Frames, before: int = 0) -> tuple[Tensor, Tensor]:
    """By the package, checked against the double's: a sample of `frames` (merged) whose tokens are
    the ones of `ids`; ``[T]`` and ``[3, S]``. Other samples must not matter."""
    others: Frames = [(2, 6)] * before
    pads = torch.tensor([[1] * before + [0] * (len(ids) - before), ids]) == 1
    rows = [(0, 1, 2 * h, 2 * w) for h, w in others] + [(1, 1, 2 * h, 2 * w) for h, w in frames]
    grid = Grid.of_rows(rows, 2)
    text, starts = text_positions(pads, torch.ones_like(pads), grid)
    mine = grid.sample == 1
    places = frame_positions(grid.part(mine), starts[mine])
    expected = xrope(pads[1:], torch.ones_like(pads[1:]), [frames], places.shape[1])
    assert torch.equal(expected[0][0], text[1:])
    assert torch.equal(expected[1][:, 0], places)
    return text[1], places


@pytest.mark.parametrize("before", [0, 2])
def test_positions_are_those_of_the_description(before: int) -> None:
    text, places = positions([0, 1, 1, 1, 0], [(3, 4)] * 3, before)
    assert text.tolist() == [0, 5, 10, 15, 16]
    assert places.view(3, 3, 13)[0, :, [0, -1]].tolist() == [[1, 5], [6, 10], [11, 15]]
    text, places = positions([0, 1, 0, 0, 0, 0, 1], [(3, 4)] * 2, before)
    assert text.tolist() == [0, 5, 6, 7, 8, 9, 14]
    assert places.view(3, 2, 13)[0, :, [0, -1]].tolist() == [[1, 5], [10, 14]]
    text, places = positions([0] * 7 + [1, 0], [(2, 2)], before)
    assert places.tolist() == [[7, 7, 7, 7, 9], [7, 7, 8, 8, 9], [7, 8, 7, 8, 9]]
    assert text.tolist()[-2:] == [9, 10]


def test_padding_stands_at_0_and_counts_for_nothing() -> None:
    pads = torch.tensor([[0, 0, 0, 1, 0], [1, 0, 0, 0, 0]]) == 1
    valid = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]) == 1
    grid = Grid.of_rows([(0, 1, 4, 4), (1, 1, 2, 8), (1, 2, 2, 2)], 2)
    text, starts = text_positions(pads, valid, grid)
    assert text.tolist() == [[0, 0, 0, 3, 4], [4, 5, 6, 0, 0]]
    assert starts.tolist() == [1, 0, 0, 0]  # the last two have no token: nobody sees them


def test_a_further_sample_of_a_row_stands_as_it_does_alone() -> None:
    """Attention would not tell: it asks for distances only."""
    pads = torch.tensor([[0, 1, 0, 1, 0, 0, 1]]) == 1
    begins = torch.tensor([[0, 0, 0, 1, 0, 1, 0]]) == 1
    grid = Grid.of_rows([(0, 1, 6, 8), (0, 1, 4, 4), (0, 1, 2, 2)], 2)
    text, starts = text_positions(pads, torch.ones_like(pads), grid, begins=begins)
    assert text.tolist() == [[0, 5, 6, 2, 3, 0, 2]]
    assert starts.tolist() == [1, 0, 1]


def test_frames_are_dealt_by_tokens_not_by_count() -> None:
    rows = [(0, 1, 40, 40), (0, 9, 4, 4), (1, 4, 2, 2)]
    holder = Grid.of_rows(rows, 2).dealt(2)
    assert holder.tolist() == [0] + [1] * 9 + [0, 0, 1, 1]
    assert Grid.of_rows(rows, 2).rows() == [list(row) for row in rows]
    assert Grid.of_rows([(0, 3, 2, 2)], 2).dealt(4).tolist() == [0, 2, 3]
    assert Grid.of_rows([], 2).dealt(3).tolist() == []
