"""How rows of text and frames are dealt: every token once, frames whole, work even."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ds_lvx.models.concatenated.deal import PADS, TEXT, Deal, owners

Piece = tuple[str, int]


def row(pieces: Sequence[Piece], unit: int) -> tuple[torch.Tensor, list[int]]:
    """The number of each token's unit, and tokens by unit; ``text`` or ``frames``, how many."""
    number: list[int] = []
    units = 0
    for kind, count in pieces:
        for _ in range(count):
            number += [TEXT] if kind == "text" else [units] * unit
            units += kind == "frames"
    return torch.tensor([number]), [unit] * units


def parts(deal: Deal) -> list[torch.Tensor]:
    """Of the only row: places of each rank's tokens."""
    return [part[part != PADS] for part in deal.column[0].split(list(deal.lengths))]


CLIPS: list[Piece] = [("text", 20), ("frames", 8)] * 6 + [("text", 30)]
ROWS: dict[str, tuple[list[Piece], int]] = {
    "one long video": ([("frames", 180), ("text", 300)], 144),
    "a short video": ([("text", 5), ("frames", 24), ("text", 60)], 16),
    "interleaved clips": (CLIPS, 16),
    "few frames, much text": ([("text", 10), ("frames", 3), ("text", 900)], 16),
    "text alone": ([("text", 1001)], 16),
}


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ROWS)
def test_tokens_and_work_are_even(name: str, ranks: int) -> None:
    """Within 10% of a rank's share; work are pairs of a query and a key that it sees."""
    number, tokens = row(*ROWS[name])
    deal = Deal.of(number >= TEXT, number, tokens, ranks)
    held = parts(deal)
    work = torch.tensor([int((part + 1).sum()) for part in held]).double()
    counts = torch.tensor([len(part) for part in held]).double()
    for found in (work, counts):
        assert (found / found.mean() - 1).abs().max() < 0.1, found / found.mean()


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(
    ("prompt", "unit", "completions", "said"),
    [
        ([("text", 20), ("frames", 125), ("text", 80)], 160, 8, 500),
        ([("text", 600)], 1, 8, 1000),
        ([("text", 2000)], 1, 8, 500),
    ],
)
def test_completions_of_a_prompt_are_even(
    prompt: list[Piece], unit: int, completions: int, said: int, ranks: int
) -> None:
    """Each sees the prompt and itself."""
    number, tokens = row([*prompt, ("text", completions * said)], unit)
    begins = number.shape[1] - completions * said
    place = torch.arange(number.shape[1])
    own = (place - begins) // said * said + begins  # where a token's completion begins
    gaps = (torch.full_like(place, begins), torch.where(place < begins, begins, own))
    deal = Deal.of(number >= TEXT, number, tokens, ranks, gaps=(gaps[0][None], gaps[1][None]))
    held, cost = parts(deal), place + 1 - (gaps[1] - gaps[0])
    work = torch.tensor([float(cost[part].sum()) for part in held])
    counts = torch.tensor([float(len(part)) for part in held])
    for found in (work, counts):
        assert (found / found.mean() - 1).abs().max() < 0.1, found / found.mean()


def above_even(name: str, ranks: int) -> str:
    """How far the busiest rank is above an even share of the work."""
    number, tokens = row(*ROWS[name])
    held = parts(Deal.of(number >= TEXT, number, tokens, ranks))
    work = torch.tensor([int((part + 1).sum()) for part in held]).double()
    return f"{float(work.max() / work.mean()) - 1:.1%}"


def test_the_document_says_how_even() -> None:
    document = (Path(__file__).parents[2] / "docs" / "concatenated.md").read_text()
    table = document.partition("| sample | 2 ranks | 4 ranks | 8 ranks |\n")[2].partition("\n\n")[0]
    rows = [line.split(" | ", 1)[1].rstrip(" |") for line in table.splitlines()[1:]]
    assert rows == [" | ".join(above_even(name, ranks) for ranks in (2, 4, 8)) for name in ROWS]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    "pieces",
    [
        CLIPS,
        [("frames", 1)],
        [("frames", 5), ("text", 3)],
        [("text", 2), ("frames", 9)],
        [("text", 3)],
    ],
)
def test_every_token_is_held_once_and_frames_are_whole(pieces: list[Piece], ranks: int) -> None:
    number, tokens = row(pieces, 4)
    deal = Deal.of(number >= TEXT, number, tokens, ranks)
    held = parts(deal)
    assert torch.cat(held).sort().values.tolist() == list(range(number.shape[1]))
    assert all(part.tolist() == sorted(part.tolist()) for part in held)
    assert all(length >= 1 for length in deal.lengths)
    for rank, part in enumerate(held):
        units = number[0, part]
        mine = [unit for unit, owner in enumerate(deal.owner) if owner == rank]
        assert units[units != TEXT].tolist() == [unit for unit in mine for _ in range(4)]
    order = deal.order(number.shape[1])
    assert deal.column.gather(1, order).tolist() == [list(range(number.shape[1]))]


def test_text_alone_is_zigzag() -> None:
    number, tokens = row([("text", 12)], 1)
    held = parts(Deal.of(number >= TEXT, number, tokens, 3))
    assert [part.tolist() for part in held] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]


def test_rows_are_dealt_by_themselves_and_padding_is_left_out() -> None:
    number = torch.tensor([[TEXT, 0, 0, TEXT, TEXT], [TEXT, TEXT, 1, 1, TEXT]])
    kept = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]).bool()
    deal = Deal.of(kept, number, [2, 2], 2)
    assert sorted(deal.column[0][deal.column[0] != PADS].tolist()) == [0, 1, 2, 3]
    assert sorted(deal.column[1][deal.column[1] != PADS].tolist()) == [1, 2, 3, 4]
    assert deal.order(5)[0, 4] == deal.order(5)[1, 0] == PADS


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 8, 13, 64, 180])
def test_equal_frames_are_as_many_on_every_rank(count: int, ranks: int) -> None:
    owner = owners([7] * count, ranks)
    held = [owner.count(rank) for rank in range(ranks)]
    assert len(owner) == count
    assert max(held) - min(held) <= (1 if count % ranks == 0 or count > 2 * ranks else 2), held
    for rank in range(ranks) if count > 16 * ranks else ():  # an early piece and a late one
        mine = [n for n, each in enumerate(owner) if each == rank]
        assert sum(b - a > 1 for a, b in pairwise(mine)) <= 1


@pytest.mark.parametrize("ranks", [2, 8, 16])
def test_large_frames_are_dealt_as_small_ones(ranks: int) -> None:
    """A million tokens, whose work multiplied is beyond 64 bits."""
    assert owners([16_000] * 60, ranks) == owners([1] * 60, ranks)
