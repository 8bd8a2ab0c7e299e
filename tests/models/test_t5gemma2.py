"""T5Gemma2 on sharded batches computes what the model computes in one process."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import pytest
import torch

from tests.models.mllama_case import (
    FURTHER,
    assert_same_training,
    plain_step,
    reference_steps,
    sharded_steps,
    whole_step,
)
from tests.models.t5gemma2_case import (
    IMAGE,
    TOKENS,
    Batch,
    ds_config,
    hard_batch,
    image_alone,
    left_padded,
    lora_model,
    one_image,
    text_only,
    tiny_model,
)
from tests.ranks import run_ranks

RULES: dict[str, tuple[dict[str, Any], Any]] = {
    # the rule of the decoder's layers, the method or the rule of the encoder's
    "lvx": ({"method": "lvx", "schedule": "gather"}, "ulysses"),
    "rotating": ({"method": "lvx", "schedule": "ring"}, "ring"),
    "ring": ({"method": "ring"}, {"method": "lvx", "recompute_kv": True}),
    "auto": ({"method": "lvx"}, "auto"),
}


def rules(name: str, ranks: int, stage: int = 0) -> dict[str, Any]:
    cross, encoder = RULES[name]
    return ds_config(stage=stage, sp_size=ranks, cross=cross, self_attn=encoder)


# ---- every kind of batch

BATCHES = {
    make.__name__: make for make in (hard_batch, left_padded, one_image, image_alone, text_only)
}


@functools.cache
def reference(name: str) -> dict[str, Any]:
    return reference_steps([[BATCHES[name]()]], tiny_model())


def step_each(ranks: int, offset: int) -> list[dict[str, Any]]:
    order = list(RULES) * 3
    return [
        plain_step(rules(rule, ranks), make(), model=tiny_model())
        for make, rule in zip(BATCHES.values(), order[offset:], strict=False)
    ]


@pytest.mark.parametrize(
    ("ranks", "offset"),
    [
        pytest.param(1, 1, marks=pytest.mark.exhaustive),
        pytest.param(2, 0, marks=pytest.mark.slow),
        *(pytest.param(3, n, marks=pytest.mark.exhaustive) for n in range(4)),
    ],
)
def test_every_kind_of_batch_equals_one_process(ranks: int, offset: int) -> None:
    results = run_ranks(step_each, ranks, ranks, offset)
    for index, name in enumerate(BATCHES):
        mine = [each[index] for each in results]
        try:
            assert_same_training(mine, reference(name), sp_size=ranks)
        except AssertionError as error:
            raise AssertionError(f"{name} on {ranks} ranks: {error}") from error
        missing = {n for each in mine for n in each["missing"]}
        assert name == "text_only" or missing == set(), name


def test_a_trainer_finds_the_logits_of_an_answer_of_fewer_tokens_than_ranks() -> None:
    found = run_ranks(whole_step, 2, rules("lvx", 2), image_alone(), make=tiny_model)
    assert_same_training(found, reference("image_alone"), sp_size=2)


def test_reference_has_gradients_everywhere() -> None:
    """Else the comparisons compare zeros."""
    silent = {name for name, grad in reference("hard_batch")["grads"].items() if not grad.any()}
    assert silent == set()


def local_images(batch: Batch, cuts: list[list[int]], rank: int) -> Batch:
    """Sample b's images ``cuts[b][rank]`` to ``cuts[b][rank + 1]``."""
    counts = (batch["input_ids"] == IMAGE).sum(dim=1) // TOKENS
    mine = [
        image
        for images, cut in zip(batch["pixel_values"].split(counts.tolist()), cuts, strict=True)
        for image in images[cut[rank] : cut[rank + 1]]
    ]
    return {
        **batch,
        "pixel_values": torch.stack(mine) if mine else None,
        "images_per_sample": torch.tensor([cut[rank + 1] - cut[rank] for cut in cuts]),
    }


def step_local(cuts: list[list[int]]) -> dict[str, Any]:
    batch = local_images(hard_batch(5), cuts, torch.distributed.get_rank())
    return plain_step(rules("lvx", 2), batch, frames="local", model=tiny_model())


@pytest.mark.parametrize("cuts", [[[0, 1, 4], [0, 1, 1], [0] * 3], [[0, 0, 4], [0, 0, 1], [0] * 3]])
def test_images_that_are_on_their_ranks_already(cuts: list[list[int]]) -> None:
    expected = reference_steps([[hard_batch(5)]], tiny_model())
    assert_same_training(run_ranks(step_local, 2, cuts), expected, sp_size=2)


# ---- training


def train_each(jobs: list[tuple[dict[str, Any], Any]], batches: Any) -> list[dict[str, Any]]:
    return [sharded_steps(config, batches, model=make()) for config, make in jobs]


def check(
    jobs: list[tuple[dict[str, Any], Any]], *, ranks: int, batches: Any, sp_size: int
) -> None:
    results = run_ranks(train_each, ranks, jobs, batches)
    for index, (config, make) in enumerate(jobs):
        expected = reference_steps(batches, make())
        try:
            assert_same_training([each[index] for each in results], expected, sp_size=sp_size)
        except AssertionError as error:
            raise AssertionError(f"job {index}, {config}: {error}") from error


def checkpointed(make: Any, *, reentrant: bool = False) -> Any:
    model = make()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def section(config: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {**config, "activation_checkpointing": settings}


def frozen_tower() -> Any:
    model = tiny_model()
    model.model.encoder.vision_tower.requires_grad_(False)
    return model


@pytest.mark.slow
@FURTHER
def test_training_equals_one_process(which: slice) -> None:
    """Two steps: methods, stages, checkpoints, LoRA, a frozen tower."""
    jobs = [
        (rules("lvx", 2, 3), tiny_model),
        (rules("rotating", 2, 2), partial(checkpointed, lora_model)),
        (section(rules("ring", 2, 1), partition_activations=True), frozen_tower),
        (section(rules("lvx", 2, 3)), tiny_model),
        (rules("ring", 2, 0), partial(checkpointed, tiny_model, reentrant=True)),
    ]
    check(jobs[which], ranks=2, batches=[[hard_batch(0)], [left_padded(1)]], sp_size=2)


@pytest.mark.exhaustive
def test_every_stage_equals_one_process() -> None:
    jobs = [(rules("rotating", 3, stage), tiny_model) for stage in range(4)]
    check(jobs, ranks=3, batches=[[hard_batch(0)], [left_padded(1)]], sp_size=3)


@pytest.mark.exhaustive
def test_a_rank_without_images_trains_along() -> None:
    jobs = [(rules("lvx", 3, 3), tiny_model), (rules("ring", 3, 0), tiny_model)]
    check(jobs, ranks=3, batches=[[one_image(7)], [text_only(8)]], sp_size=3)
