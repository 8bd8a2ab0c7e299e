"""The rule itself, and the blocks that kernels compute by it."""

from __future__ import annotations

import pytest
import torch

from ds_lvx import Visibility
from ds_lvx.kernels.visibility import EVERYTHING


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
    ],
)
def test_mistakes(change: dict[str, object], text: str) -> None:
    rule = example()
    fields = {"q_start": rule.q_start, "q_end": rule.q_end, "kv_pos": rule.kv_pos} | change
    with pytest.raises(ValueError, match=text):
        Visibility(**fields)  # type: ignore[arg-type]
