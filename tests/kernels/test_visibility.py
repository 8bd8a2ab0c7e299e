"""The rule itself, and the blocks that kernels compute by it."""

from __future__ import annotations

import pytest
import torch

from ds_lvx import Visibility
from ds_lvx.kernels.visibility import EVERYTHING

NO_GAP = torch.zeros(1, 4, dtype=torch.int32)


def example() -> Visibility:
    """Two images of two tokens; a text that sees nothing, image 0, both, everything."""
    rows = {"q_start": [0, 0, 0, -1], "q_end": [0, 1, 2, EVERYTHING], "kv_pos": [0, 0, 1, -1, 1]}
    return Visibility(**{name: torch.tensor([value]).int() for name, value in rows.items()})


def test_the_mask_follows_the_rule() -> None:
    assert example().mask().int().tolist() == [
        [[0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 1], [1, 1, 1, 1, 1]]
    ]
    assert Visibility.all(2, 3, 4, device=torch.device("cpu")).mask().all()


def gapped() -> Visibility:
    """A prompt of two tokens and two completions of two, the last query of which sees nothing."""
    rows = {"q_start": [0] * 6, "q_end": [1, 2, 3, 4, 5, 6], "kv_pos": [0, 1, 2, 3, 4, 5]}
    rows |= {"gap_start": [2, 2, 2, 2, 2, -1], "gap_end": [0, 0, 2, 2, 4, EVERYTHING]}
    return Visibility(**{name: torch.tensor([value]).int() for name, value in rows.items()})


def test_gaps_are_not_seen() -> None:
    """Empty ones are none; and what becomes of a rule becomes of them."""
    expected = torch.ones(6, 6).tril().bool()
    expected[4:, 2:4] = expected[5] = False
    rule = gapped()
    assert torch.equal(rule.mask()[0], expected)
    assert torch.equal(rule.mask(slice(3, 6), slice(1, 5))[0], expected[3:, 1:5])
    order = torch.tensor([4, 0, 5])
    for rows, keys in ((slice(3, 6), slice(1, 5)), (order, order)):
        part = rule.part(rows, keys).contiguous().clone()
        assert part.has_gaps
        assert torch.equal(part.mask()[0], expected[rows][:, keys])
    assert torch.equal(rule.each(lambda each: each.flip(1)).mask()[0], expected.flip(0, 1))
    assert torch.equal(Visibility.of(rule.queries, rule.kv_pos).mask(), rule.mask())
    assert not example().has_gaps


def test_a_key_at_everything_is_seen_by_nobody() -> None:
    rule = example()
    nowhere = torch.full((1, 3), EVERYTHING, dtype=torch.int32)
    hidden = Visibility(rule.q_start, rule.q_end, nowhere)
    assert not hidden.mask().any()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"q_start": torch.zeros(1, 4)}, r"q_start: got torch.float32 \[1, 4\].*int32"),
        ({"kv_pos": [1, 2]}, "kv_pos: got list"),
        ({"kv_pos": torch.zeros(3).int()}, r"kv_pos: got torch.int32 \[3\]"),
        ({"q_end": torch.zeros(1, 5).int()}, r"q_end \[1, 5\].*the same batch"),
        ({"kv_pos": torch.zeros(2, 5).int()}, r"kv_pos \[2, 5\]"),
        ({"kv_pos": torch.zeros(1, 5).int().to("meta")}, "expected one device"),
        ({"gap_start": NO_GAP}, "gap_end: got NoneType; expected an int32 tensor"),
        ({"gap_end": NO_GAP}, "gap_start: got NoneType"),
        ({"gap_start": NO_GAP, "gap_end": NO_GAP.long()}, "gap_end: got torch.int64"),
        (
            {"gap_start": NO_GAP, "gap_end": NO_GAP[:, 1:]},
            r"gap_end \[1, 3\].*all that queries have",
        ),
        ({"gap_start": NO_GAP, "gap_end": NO_GAP.to("meta")}, "on cpu and meta; expected one"),
    ],
)
def test_mistakes(change: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Visibility(**vars(example()) | change)  # type: ignore[arg-type]
