"""Video-LLaMA on sharded batches computes what the model computes in one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.models.mllama_case import (
    FURTHER,
    assert_same_training,
    further,
    plain_step,
    reference_steps,
    sharded_steps,
)
from tests.models.video_llama_case import (
    Batch,
    collated,
    ds_config,
    hard_batch,
    left_padded,
    lora_model,
    one_frame,
    text_only,
    tiny_model,
)
from tests.ranks import run_ranks

CASES: dict[str, Any] = {
    "hard": hard_batch,
    "left padded": left_padded,
    "collated": collated,
    "one frame": one_frame,
    "text alone": text_only,
}
METHODS = ("ulysses", "ring", "lvx")


def rules(method: str, ranks: int, stage: int = 0) -> dict[str, Any]:
    return ds_config(stage=stage, sp_size=ranks, self_attn=method)


def for_ranks(batch: Batch) -> Batch:
    """Without frames there are no pixels."""
    if len(batch["images"]) > 0:
        return batch
    return {key: value for key, value in batch.items() if key != "images"}


@functools.cache
def reference(name: str) -> dict[str, Any]:
    return reference_steps([[CASES[name]()]], tiny_model())


def step_each(ranks: int, offset: int) -> list[dict[str, Any]]:
    return [
        plain_step(rules(METHODS[(number + offset) % 3], ranks), for_ranks(make()), model=model)
        for number, (make, model) in enumerate((make, tiny_model()) for make in CASES.values())
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "offset"), [(2, 0), pytest.param(3, 1, marks=pytest.mark.exhaustive)]
)
def test_every_kind_of_batch_equals_one_process(ranks: int, offset: int) -> None:
    results = run_ranks(step_each, ranks, ranks, offset)
    for index, name in enumerate(CASES):
        mine = [each[index] for each in results]
        try:
            assert_same_training(mine, reference(name), sp_size=ranks)
        except AssertionError as error:
            raise AssertionError(f"{name} on {ranks} ranks: {error}") from error
        missing = {parameter for each in mine for parameter in each["missing"]}
        assert bool(missing) == (name == "text alone"), (name, missing)


def test_reference_has_gradients_everywhere() -> None:
    """Else the comparisons compare zeros."""
    grads = reference("hard")["grads"]
    assert {name for name, grad in grads.items() if not grad.any()} == set()


def step_local(cuts: list[list[int]]) -> dict[str, Any]:
    """Frames that are on their ranks already, with their numbers by sample."""
    rank, batch = torch.distributed.get_rank(), hard_batch()
    videos = batch["images"].split(batch["images_per_sample"].tolist())
    mine = [video[first:last] for video, (first, last) in zip(videos, cuts[rank], strict=True)]
    counts = torch.tensor([len(video) for video in mine])
    local = {**batch, "images": torch.cat(mine), "images_per_sample": counts}
    return plain_step(rules("ring", 2), local, frames="local", model=tiny_model())


@pytest.mark.parametrize("cuts", [[(0, 2), (0, 0), (0, 0), (0, 2)], [(0, 0)] * 4])
def test_frames_that_are_on_their_ranks_already(cuts: list[tuple[int, int]]) -> None:
    """Those of a video in order over the ranks; one rank may have none at all."""
    whole = (5, 1, 0, 2)
    others = [(last, count) for (_, last), count in zip(cuts, whole, strict=True)]
    results = run_ranks(step_local, 2, [cuts, others])
    assert_same_training(results, reference("hard"), sp_size=2)


# ---- training


def train_each(jobs: list[tuple[dict[str, Any], Any, Any]]) -> list[dict[str, Any]]:
    return [
        sharded_steps(
            config, [[for_ranks(each) for each in step] for step in batches], model=make()
        )
        for config, make, batches in jobs
    ]


def check(jobs: list[tuple[dict[str, Any], Any, Any]], *, ranks: int, sp_size: int) -> None:
    results = run_ranks(train_each, ranks, jobs)
    for index, (config, make, batches) in enumerate(jobs):
        expected = reference_steps(batches, make())
        try:
            assert_same_training([each[index] for each in results], expected, sp_size=sp_size)
        except AssertionError as error:
            raise AssertionError(f"job {index}, {config}: {error}") from error


def as_published() -> Any:
    """The video branch trains; tower, Q-Former and language model are frozen."""
    model = tiny_model().requires_grad_(False)
    for part in (model.video_Qformer, model.video_frame_position_embedding, model.llama_proj):
        part.requires_grad_(True)
    model.video_query_tokens.requires_grad_(True)
    return model


def frames_alone() -> Any:
    """What is replicated is frozen, and what makes the frames trains."""
    model = tiny_model().requires_grad_(False)
    model.video_frame_position_embedding.requires_grad_(True)
    model.Qformer.requires_grad_(True)
    return model


def checkpointed() -> Any:
    model = tiny_model(kv_heads=4)
    model.llama_model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def section(config: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {**config, "activation_checkpointing": settings}


TWO = [[hard_batch(0)], [collated(1)]]


@pytest.mark.slow
@further(2)
def test_training_equals_one_process(which: slice) -> None:
    """Two steps: stages, methods, what is frozen, a batch of text alone."""
    jobs = [
        (rules("ring", 2, 3), tiny_model, [*TWO, [text_only()]]),
        (rules("lvx", 2, 0), as_published, TWO),
        (rules("ulysses", 2, 0), tiny_model, TWO),
        (rules("lvx", 2, 3), as_published, TWO),
    ]
    check(jobs[which], ranks=2, sp_size=2)


@pytest.mark.exhaustive
@FURTHER
def test_other_settings_train_as_one_process(which: slice) -> None:
    """Checkpoints, LoRA, frames that train beside frozen queries."""
    jobs = [
        (rules("ring", 2, 1), frames_alone, TWO),
        (rules("ulysses", 2, 2), lora_model, TWO),
        (rules("ulysses", 2, 0), checkpointed, TWO),
        (section(rules("ring", 2, 3), partition_activations=True), tiny_model, TWO),
    ]
    check(jobs[which], ranks=2, sp_size=2)


@pytest.mark.exhaustive
def test_every_stage_equals_one_process() -> None:
    jobs = [(rules("ring", 3, stage), tiny_model, TWO) for stage in range(4)]
    check(jobs, ranks=3, sp_size=3)


@pytest.mark.exhaustive
def test_a_rank_without_frames_trains_along() -> None:
    jobs = [
        (rules("ring", 3, 0), tiny_model, [[one_frame(7)]]),
        (rules("ring", 3, 3), tiny_model, [[one_frame(7)], [text_only(8)]]),
    ]
    check(jobs, ranks=3, sp_size=3)
