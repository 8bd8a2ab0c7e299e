"""The rule itself, and the blocks that kernels compute by it."""

from __future__ import annotations

import pytest
import torch

from ds_lvx import Visibility
from ds_lvx.kernels.visibility import EVERYTHING, blocks


def example() -> Visibility:
    """Two images of two tokens; a text that sees nothing, image 0, both, everything."""
    rows = {"q_start": [0, 0, 0, -1], "q_end": [0, 1, 2, EVERYTHING], "kv_pos": [0, 0, 1, -1, 1]}
    return Visibility(**{name: torch.tensor([value]).int() for name, value in rows.items()})


def test_the_mask_follows_the_rule() -> None:
    assert example().mask().int().tolist() == [
        [[0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 1], [1, 1, 1, 1, 1]]
    ]
    assert Visibility.all(2, 3, 4, device=torch.device("cpu")).mask().all()


def test_a_key_at_everything_is_seen_by_nobody() -> None:
    hidden = example().with_keys(torch.full((1, 3), EVERYTHING, dtype=torch.int32))
    assert not hidden.mask().any()


def test_ranges_travel_and_come_back() -> None:
    rule = example()
    again = rule.with_queries(rule.ranges)
    assert torch.equal(again.mask(), rule.mask())


@pytest.mark.parametrize("seed", range(8))
def test_blocks_cover_exactly_what_is_visible(seed: int) -> None:
    """Every visible pair lies in one block, and what a block leaves unmasked is visible."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = 13, 40
    position = torch.randint(-1, 6, (2, keys), generator=generator).int()
    if seed % 2:
        position = position.sort(dim=1).values
    start = torch.randint(-1, 6, (2, queries), generator=generator).int()
    rule = Visibility(start, start + torch.randint(0, 3, (2, queries)).int(), position)
    covered = torch.zeros(2, queries, keys, dtype=torch.int32)
    for block in blocks(
        rule, seqlen_q=queries, seqlen_kv=keys, queries_per_block=5, keys_per_block=7
    ):
        part = covered[:, block.queries, block.keys]
        part += torch.ones_like(part) if block.mask is None else block.mask.int()
    assert torch.equal(covered, rule.mask().int())


def test_blocks_that_nobody_sees_are_left_out() -> None:
    rows = torch.arange(8, dtype=torch.int32)[None]
    rule = Visibility(rows, rows + 1, torch.arange(800, dtype=torch.int32)[None] // 10)
    found = list(blocks(rule, seqlen_q=8, seqlen_kv=800, queries_per_block=8, keys_per_block=10))
    assert [(b.queries, b.keys, b.mask) for b in found] == [
        (slice(i, i + 1), slice(10 * i, 10 * i + 10), None) for i in range(8)
    ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"q_start": torch.zeros(1, 4)}, r"q_start: got torch.float32 \[1, 4\].*int32"),
        ({"kv_pos": [1, 2]}, "kv_pos: got list"),
        ({"kv_pos": torch.zeros(3).int()}, r"kv_pos: got torch.int32 \[3\]"),
        ({"q_end": torch.zeros(1, 5).int()}, r"q_end \[1, 5\].*the same batch"),
        ({"kv_pos": torch.zeros(2, 5).int()}, r"kv_pos \[2, 5\]"),
        ({"kv_pos": torch.zeros(1, 5).int().to("meta")}, "expected one device"),
    ],
)
def test_mistakes(change: dict[str, object], text: str) -> None:
    rule = example()
    fields = {"q_start": rule.q_start, "q_end": rule.q_end, "kv_pos": rule.kv_pos} | change
    with pytest.raises(ValueError, match=text):
        Visibility(**fields)  # type: ignore[arg-type]
