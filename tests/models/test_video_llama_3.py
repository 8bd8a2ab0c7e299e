"""VideoLLaMA 3 on sharded batches computes what the model computes in one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.models import concatenated_case as case
from tests.models.video_llama_3_case import (
    hard_batch,
    left_padded,
    one_image,
    one_video,
    text_only,
    tiny_model,
    whole_video,
)

BATCHES = (hard_batch, left_padded, one_image, one_video, whole_video, text_only)
NAME = "video_llama_3"


@functools.cache
def expected() -> dict[str, Any]:
    return case.references(BATCHES, tiny_model)


@pytest.mark.parametrize(
    ("ranks", "offset"),
    [
        pytest.param(1, 1, marks=pytest.mark.exhaustive),
        pytest.param(2, 0, marks=pytest.mark.slow),
        *(pytest.param(3, n, marks=pytest.mark.exhaustive) for n in range(4)),
        pytest.param(4, 2, marks=pytest.mark.exhaustive),
    ],
)
def test_every_kind_of_batch_equals_one_process(ranks: int, offset: int) -> None:
    case.check_each(NAME, tiny_model, BATCHES, expected(), ranks=ranks, offset=offset)


def test_reference_has_gradients_everywhere() -> None:
    """Else the comparisons compare zeros."""
    silent = {name for name, grad in expected()["hard_batch"]["grads"].items() if not grad.any()}
    assert silent == set()
