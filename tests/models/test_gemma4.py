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
    with_audio_tower,
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


@pytest.mark.slow
def test_experts_and_a_tower_for_sounds_train_at_any_stage() -> None:
    """The larger models, with experts, and one with a tower that no batch asks for."""
    jobs = [
        (case.rules(NAME, "ulysses", 2, 3), moe_model),
        (case.section(case.rules(NAME, "lvx", 2, 2)), moe_model),
        (case.rules(NAME, "ring", 2, 3), with_audio_tower),
        (case.rules(NAME, "ring", 2, 2), with_audio_tower),
    ]
    case.check(jobs, ranks=2, batches=[[hard_batch(0)], [left_padded(1)]], sp_size=2)
