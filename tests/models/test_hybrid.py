"""Training by hybrids is training in one process, in text and cross-attention of the families."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import pytest

from tests.models import mllama_case, mplugowl3_case, t5gemma2_case
from tests.models.mllama_case import (
    FURTHER,
    assert_same_training,
    reference_steps,
    sharded_steps,
)
from tests.ranks import run_ranks

CASES = {"mllama": mllama_case, "mplugowl3": mplugowl3_case, "t5gemma2": t5gemma2_case}


def hybrid(ulysses: int, **keys: Any) -> dict[str, Any]:
    return {"method": "hybrid", "ulysses": ulysses, **keys}


def config(case: ModuleType, stage: int, ranks: int, ulysses: int, **keys: Any) -> dict[str, Any]:
    """Cross-attention by lvx across, text by ring across; keys are of cross-attention's rule."""
    rules = {"cross": hybrid(ulysses, **keys), "self_attn": hybrid(ulysses)}
    found: dict[str, Any] = case.ds_config(stage=stage, sp_size=ranks, **rules)
    return found


@functools.cache
def batches(name: str) -> list[list[dict[str, Any]]]:
    return [[CASES[name].hard_batch(seed)] for seed in (0, 1)]


def train_each(name: str, configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One engine after the other."""
    model = CASES[name].tiny_model
    return [sharded_steps(each, batches(name), model=model()) for each in configs]


def check(name: str, configs: list[dict[str, Any]], *, ranks: int) -> None:
    answers = run_ranks(train_each, ranks, name, configs)
    expected = reference_steps(batches(name), CASES[name].tiny_model())
    for index in range(len(configs)):
        mine = [each[index] for each in answers]
        # Four parts of a softmax in fp32, and after a step: single logits differ by 1.5e-5.
        assert_same_training(mine, expected, sp_size=ranks, atol=2e-5)


@pytest.mark.slow
def test_two_ranks_that_share_heads() -> None:
    """Both; or each its own, with ring across in cross-attention."""
    rings = config(mllama_case, 1, 2, 1, across="ring")
    check("mllama", [config(mllama_case, 3, 2, 2), rings], ranks=2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CASES)
@FURTHER
def test_two_subgroups_of_two(name: str, which: slice) -> None:
    """Stages, a schedule, ring across in cross-attention, checkpointed layers."""
    case = CASES[name]
    configs = [
        {**config(case, 1, 4, 2, schedule="ring"), "activation_checkpointing": {}},
        config(case, 2, 4, 2, across="ring"),
        config(case, 3, 4, 2),
    ]
    check(name, configs[which], ranks=4)
