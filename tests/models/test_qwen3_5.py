"""Qwen3.5 on sharded batches computes what the model computes in one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.models import concatenated_case as case
from tests.models.qwen3_5_case import (
    hard_batch,
    left_padded,
    one_image,
    one_video,
    text_only,
    tiny_model,
)

BATCHES = (hard_batch, left_padded, one_image, one_video, text_only)
NAME = "qwen3_5"


@functools.cache
def expected() -> dict[str, Any]:
    return case.references(BATCHES, tiny_model)


@pytest.mark.parametrize(
    ("ranks", "offset"),
    [
        pytest.param(1, 1, marks=pytest.mark.exhaustive),
        pytest.param(2, 0, marks=pytest.mark.slow),
        *(pytest.param(3, n, marks=pytest.mark.exhaustive) for n in range(4)),
    ],
)
def test_every_kind_of_batch_equals_one_process(ranks: int, offset: int) -> None:
    case.check_each(NAME, tiny_model, BATCHES, expected(), ranks=ranks, offset=offset)


def with_holes(seed: int = 6) -> dict[str, Any]:
    """Padding in the midst of samples, and behind some of it a token that is learnt: it moves the
    state of a layer, though nobody sees it."""
    batch = hard_batch(seed)
    for row, column in ((0, 2), (0, 3), (0, 36), (1, 5), (1, 12)):
        assert batch["mm_token_type_ids"][row, column] == 0
        batch["attention_mask"][row, column] = 0
        batch["labels"][row, column] = -100
    batch["labels"][1, 13] = 7
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_padding_between_tokens(ranks: int) -> None:
    """Also where heads do not divide by the ranks: there are six."""
    alone = case.references([with_holes], tiny_model)
    case.check_each(NAME, tiny_model, [with_holes], alone, ranks=ranks, offset=2)


def test_reference_has_gradients_everywhere() -> None:
    """Else the comparisons compare zeros."""
    silent = {name for name, grad in expected()["hard_batch"]["grads"].items() if not grad.any()}
    assert silent == set()
