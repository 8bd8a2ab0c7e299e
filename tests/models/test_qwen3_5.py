"""Qwen3.5 on sharded batches computes what the model computes in one process."""

from __future__ import annotations

import functools
from importlib import import_module
from pathlib import Path
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


def of(name: str) -> Any:
    return import_module(f"tests.models.{name}_case")


@functools.cache
def expected(name: str) -> dict[str, Any]:
    return case.references(BATCHES, of(name).tiny_model)


@pytest.mark.parametrize(
    ("name", "ranks", "offset"),
    [
        pytest.param(NAME, 1, 1, marks=pytest.mark.exhaustive),
        pytest.param(NAME, 2, 0, marks=pytest.mark.slow),
        *(pytest.param(NAME, 3, n, marks=pytest.mark.exhaustive) for n in range(4)),
        pytest.param("qwen3_5_moe", 3, 2, marks=pytest.mark.slow),
        pytest.param("qwen3_5_moe", 2, 1, marks=pytest.mark.exhaustive),
    ],
)
def test_every_kind_of_batch_equals_one_process(name: str, ranks: int, offset: int) -> None:
    model = of(name).tiny_model
    case.check_each(name, model, BATCHES, expected(name), ranks=ranks, offset=offset)


@pytest.mark.parametrize("name", [NAME, "qwen3_5_moe"])
def test_reference_has_gradients_everywhere(name: str) -> None:
    """Else the comparisons compare zeros: of every expert, too."""
    for key, grad in expected(name)["hard_batch"]["grads"].items():
        experts = grad if ".experts." in key else grad[None]
        assert all(each.any() for each in experts), key


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


# ---- of experts


@pytest.mark.slow
def test_checkpoints_are_loaded_and_saved_as_they_are_at_zero_3(tmp_path: Path) -> None:
    name = "qwen3_5_moe"
    case.check_saved(name, of(name).tiny_model().bfloat16(), tmp_path)
