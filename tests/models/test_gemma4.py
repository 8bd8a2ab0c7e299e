"""Gemma 4 on sharded batches computes what the model computes in one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.models import concatenated_case as case
from tests.models.gemma4_case import (
    hard_batch,
    larger_model,
    left_padded,
    moe_model,
    one_image,
    one_video,
    text_only,
    tiny_model,
    without_types,
)

BATCHES = (hard_batch, left_padded, one_image, one_video, without_types, text_only)
MODELS = {each.__name__: each for each in (tiny_model, larger_model, moe_model)}
NAME = "gemma4"


@functools.cache
def expected(model: str) -> dict[str, Any]:
    return case.references(BATCHES, MODELS[model])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("ranks", "offset"),
    [
        pytest.param(1, 1, marks=pytest.mark.exhaustive),
        pytest.param(2, 0, marks=pytest.mark.slow),
        *(pytest.param(3, n, marks=pytest.mark.exhaustive) for n in range(4)),
    ],
)
def test_every_kind_of_batch_equals_one_process(ranks: int, offset: int, model: str) -> None:
    case.check_each(NAME, MODELS[model], BATCHES, expected(model), ranks=ranks, offset=offset)


def test_reference_has_gradients_everywhere() -> None:
    """Else the comparisons compare zeros."""
    for model in MODELS:
        assert all(grad.any() for grad in expected(model)["hard_batch"]["grads"].values())
