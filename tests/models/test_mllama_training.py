"""Training mllama on sharded batches is training transformers' own model in one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.models.mllama_case import (
    Batch,
    assert_same_training,
    ds_config,
    hard_batch,
    make_batch,
    reference_steps,
    sharded_steps,
)
from tests.ranks import run_ranks

CROSS: dict[str, tuple[dict[str, Any], str]] = {
    # the rule of the cross-attention layers, the method of the text layers
    "lvx": ({"method": "lvx", "schedule": "ring"}, "ring"),
    "lvx recompute": ({"method": "lvx", "recompute_kv": True}, "ulysses"),
    "ring": ({"method": "ring"}, "ring"),
    "ulysses": ({"method": "ulysses"}, "ulysses"),
}


def configs(stage: int, sp_size: int, names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        ds_config(stage=stage, sp_size=sp_size, cross=CROSS[name][0], self_attn=CROSS[name][1])
        for name in names
    ]


def train_each(
    each: list[dict[str, Any]], batches: list[list[Batch]], frames: str = "all"
) -> list[dict[str, Any]]:
    """One engine after the other in the same processes, as a notebook would do it."""
    return [sharded_steps(config, batches, frames=frames) for config in each]


def check(
    stage: int,
    *,
    ranks: int,
    sp_size: int,
    names: tuple[str, ...],
    batches: list[list[Batch]],
    reference: dict[str, Any],
) -> None:
    results = run_ranks(train_each, ranks, configs(stage, sp_size, names), batches)
    for index, _name in enumerate(names):
        assert_same_training([each[index] for each in results], reference, sp_size=sp_size)


def one_replica() -> list[list[Batch]]:
    return [[hard_batch(0)], [hard_batch(1)]]


def two_replicas() -> list[list[Batch]]:
    other = make_batch([[0, 6], [2, 3]], length=12, num_tiles=[[1, 2], [2, 2]], seed=7)
    return [[hard_batch(0), other], [hard_batch(1), hard_batch(2)]]


@functools.cache
def reference(replicas: int) -> dict[str, Any]:
    return reference_steps(one_replica() if replicas == 1 else two_replicas())


def test_reference_has_gradients_everywhere() -> None:
    """Else the comparisons below compare zeros."""
    silent = {name for name, grad in reference(1)["grads"].items() if not grad.any()}
    assert silent == set()


@pytest.mark.parametrize(
    ("stage", "ranks", "names"),
    [
        pytest.param(0, 2, ("lvx", "ulysses"), marks=pytest.mark.slow),
        pytest.param(1, 2, ("ring",), marks=pytest.mark.slow),
        (2, 2, ("lvx recompute",)),
        pytest.param(3, 2, ("lvx recompute", "ring"), marks=pytest.mark.exhaustive),
        pytest.param(0, 2, ("lvx recompute", "ring"), marks=pytest.mark.exhaustive),
        pytest.param(1, 2, ("lvx recompute",), marks=pytest.mark.exhaustive),
        pytest.param(2, 2, ("ulysses",), marks=pytest.mark.exhaustive),
        pytest.param(3, 2, ("lvx", "ulysses"), marks=pytest.mark.exhaustive),
        pytest.param(3, 3, ("lvx recompute",), marks=pytest.mark.slow),
        pytest.param(0, 3, ("lvx",), marks=pytest.mark.exhaustive),
        pytest.param(1, 3, ("ulysses",), marks=pytest.mark.exhaustive),
        pytest.param(2, 3, ("ring",), marks=pytest.mark.exhaustive),
    ],
)
def test_training_equals_one_process(stage: int, ranks: int, names: tuple[str, ...]) -> None:
    check(
        stage,
        ranks=ranks,
        sp_size=ranks,
        names=names,
        batches=one_replica(),
        reference=reference(1),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "name"), [pytest.param(0, "ring", marks=pytest.mark.exhaustive), (2, "lvx")]
)
def test_two_replicas_of_two_ranks_equal_one_process(stage: int, name: str) -> None:
    check(
        stage,
        ranks=4,
        sp_size=2,
        names=(name,),
        batches=two_replicas(),
        reference=reference(2),
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize(("stage", "name"), [(1, "ulysses"), (3, "lvx recompute")])
def test_a_replica_without_images_beside_one_with_images(stage: int, name: str) -> None:
    """All ranks take part in ZeRO's collectives for the vision tower, images or not."""
    text = {key: hard_batch(3)[key] for key in ("input_ids", "attention_mask", "labels")}
    batches = [[hard_batch(0), text], [text, hard_batch(1)]]
    check(
        stage,
        ranks=4,
        sp_size=2,
        names=(name,),
        batches=batches,
        reference=reference_steps(batches),
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.exhaustive), 3])
def test_a_step_without_images_behind_one_with_some(stage: int) -> None:
    """What it does not use does not get the gradients of the step before once more.

    The first step has one image, so that rank 1 has none and trains along.
    """
    text = {key: hard_batch(3)[key] for key in ("input_ids", "attention_mask", "labels")}
    one_image = make_batch([[1]], length=9, num_tiles=[[2]], seed=21)
    batches = [[one_image], [text], [hard_batch(1)]]
    check(
        stage,
        ranks=2,
        sp_size=2,
        names=("lvx recompute",),
        batches=batches,
        reference=reference_steps(batches),
    )


def test_one_rank_a_sample_needs_no_method() -> None:
    config = ds_config(stage=1, sp_size=1, cross={"method": "lvx"}, self_attn="ring")
    config["ds_lvx"]["layers"] = []
    results = run_ranks(sharded_steps, 2, config, two_replicas())
    assert_same_training(results, reference(2), sp_size=1)
