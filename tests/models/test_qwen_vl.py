"""Qwen-VL on sharded batches computes what the model computes in one process."""

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
)
from tests.models.qwen_vl_case import (
    Batch,
    ds_config,
    for_one_process,
    hard_batch,
    left_padded,
    lora_model,
    one_image,
    text_only,
    tiny_model,
)
from tests.ranks import run_ranks


def evaluated() -> Any:
    """Of a text that is longer than those of its training: other frequencies, larger queries."""
    return tiny_model(seq_length=9).eval()


CASES: dict[str, tuple[Any, Any]] = {
    # the batch, the model
    "hard": (hard_batch, tiny_model),
    "left padded": (left_padded, tiny_model),
    "one image": (one_image, partial(tiny_model, rotary_pct=0.5)),
    "text alone": (text_only, tiny_model),
    "evaluated": (hard_batch, evaluated),
}
METHODS = ("ulysses", "ring", "lvx")


def rules(method: str, ranks: int, stage: int = 0) -> dict[str, Any]:
    return ds_config(stage=stage, sp_size=ranks, self_attn=method)


def without_padding(results: list[dict[str, Any]], batches: list[Batch]) -> list[dict[str, Any]]:
    """Logits of padding, of which some sees nothing, are of no matter: set them to 0.

    Args:
        results: of the ranks that share a batch, in order.
        batches: of each step.
    """
    for step, batch in enumerate(batches):
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).unsqueeze(-1)
        order = results[0]["shards"][step] if "shards" in results[0] else None
        if order is not None:
            mask = mask[:, order[0].argsort()]
        first = 0
        for result in results:
            found = result["logits"][step]
            result["logits"][step] = found * mask[:, first : first + found.shape[1]]
            first += found.shape[1]
    return results


def expected_of(batches: list[list[Batch]], model: Any) -> dict[str, Any]:
    own = [[for_one_process(each) for each in step] for step in batches]
    found = reference_steps(own, model)
    for replica in range(len(batches[0])):
        mine = {"logits": [logits[replica] for logits in found["logits"]]}
        without_padding([mine], [step[replica] for step in batches])
        for step, logits in enumerate(mine["logits"]):
            found["logits"][step][replica] = logits
    return found


@functools.cache
def reference(name: str) -> dict[str, Any]:
    make, model = CASES[name]
    return expected_of([[make()]], model())


def step_each(ranks: int, offset: int) -> list[dict[str, Any]]:
    return [
        plain_step(rules(METHODS[(number + offset) % 3], ranks), make(), model=model())
        for number, (make, model) in enumerate(CASES.values())
    ]


def trained_only(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`plain_step` of all ranks without the gradient of what never trains."""
    for result in results:
        result["grads"] = {k: v for k, v in result["grads"].items() if "pos_embed" not in k}
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "offset"), [(2, 0), pytest.param(3, 1, marks=pytest.mark.exhaustive)]
)
def test_every_kind_of_batch_equals_one_process(ranks: int, offset: int) -> None:
    results = run_ranks(step_each, ranks, ranks, offset)
    for index, (name, (make, _)) in enumerate(CASES.items()):
        mine = trained_only([each[index] for each in results])
        try:
            assert_same_training(without_padding(mine, [make()]), reference(name), sp_size=ranks)
        except AssertionError as error:
            raise AssertionError(f"{name} on {ranks} ranks: {error}") from error
        missing = {n for each in mine for n in each["missing"] if "pos_embed" not in n}
        assert all("visual" in n for n in missing), missing
        assert bool(missing) == (name == "text alone"), (name, missing)


def test_reference_has_gradients_everywhere() -> None:
    """Else the comparisons compare zeros."""
    silent = {name for name, grad in reference("hard")["grads"].items() if not grad.any()}
    assert silent == set()


def step_local(cuts: list[list[tuple[int, int]]]) -> dict[str, Any]:
    """The images of each sample that are on their ranks already, with their numbers by sample."""
    rank, batch = torch.distributed.get_rank(), hard_batch()
    pixels = [batch["pixel_values"][first:last] for first, last in cuts[rank]]
    counts = torch.tensor([len(each) for each in pixels])
    local = {**batch, "pixel_values": torch.cat(pixels), "images_per_sample": counts}
    return plain_step(rules("ring", 2), local, frames="local", model=tiny_model())


def test_images_that_are_on_their_ranks_already() -> None:
    cuts = [[(0, 1), (3, 4), (4, 4)], [(1, 3), (4, 4), (4, 4)]]
    results = trained_only(run_ranks(step_local, 2, cuts))
    results = without_padding(results, [hard_batch()])
    assert_same_training(results, reference("hard"), sp_size=2)


# ---- training


def train_each(jobs: list[tuple[dict[str, Any], Any, Any]]) -> list[dict[str, Any]]:
    return [sharded_steps(config, batches, model=make()) for config, make, batches in jobs]


def check(jobs: list[tuple[dict[str, Any], Any, Any]], *, ranks: int, sp_size: int) -> None:
    results = run_ranks(train_each, ranks, jobs)
    for index, (config, make, batches) in enumerate(jobs):
        mine = [each[index] for each in results]
        for replica in range(ranks // sp_size):
            group = mine[replica * sp_size :][:sp_size]
            without_padding(group, [step[replica] for step in batches])
        try:
            assert_same_training(mine, expected_of(batches, make()), sp_size=sp_size)
        except AssertionError as error:
            raise AssertionError(f"job {index}, {config}: {error}") from error


def checkpointed(make: Any) -> Any:
    model = make()
    model.gradient_checkpointing_enable()
    return model


def frozen_tower() -> Any:
    model = tiny_model()
    model.transformer.visual.requires_grad_(False)
    return model


def section(config: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {**config, "activation_checkpointing": settings}


@pytest.mark.slow
@FURTHER
def test_training_equals_one_process(which: slice) -> None:
    """Two steps: stages, methods, checkpoints, LoRA, a frozen tower."""
    two = [[hard_batch(0)], [left_padded(1)]]
    jobs = [
        (rules("ulysses", 2, 3), tiny_model, [*two, [text_only()]]),
        (rules("ring", 2, 0), frozen_tower, two),
        (rules("ulysses", 2, 2), partial(checkpointed, lora_model), two),
        (section(rules("ring", 2, 1)), tiny_model, two),
        (section(rules("lvx", 2, 3), partition_activations=True), tiny_model, two),
    ]
    check(jobs[which], ranks=2, sp_size=2)


@pytest.mark.exhaustive
def test_every_stage_equals_one_process() -> None:
    two = [[hard_batch(0)], [left_padded(1)]]
    jobs = [(rules("ulysses", 2, stage), tiny_model, two) for stage in range(4)]
    check(jobs, ranks=2, sp_size=2)


@pytest.mark.exhaustive
def test_a_rank_without_images_trains_along() -> None:
    jobs = [
        (rules("ring", 3, stage), tiny_model, [[one_image(7)], [text_only(8)]]) for stage in (0, 3)
    ]
    check(jobs, ranks=3, sp_size=3)
