"""Gemma 3 on sharded batches computes what the model computes in one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.models import concatenated_case as case
from tests.models.gemma3_case import (
    hard_batch,
    left_padded,
    one_image,
    one_video,
    text_only,
    tiny_model,
    without_types,
)

BATCHES = (hard_batch, left_padded, one_image, one_video, without_types, text_only)
NAME = "gemma3"


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


def test_reference_has_gradients_everywhere() -> None:
    """Else the comparisons compare zeros."""
    assert all(grad.any() for grad in expected()["hard_batch"]["grads"].values())
