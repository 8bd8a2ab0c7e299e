"""BLIP-2, InstructBLIP and InstructBLIP-Video on sharded batches compute what they do by themselves
in one process."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import pytest
import torch

from tests.models.blip_case import (
    Batch,
    answers,
    ds_config,
    for_one_process,
    hard_batch,
    instructed,
    left_padded,
    llama,
    lora_model,
    one_image,
    t5,
    text_only,
    tiny_model,
    videos,
)
from tests.models.mllama_case import (
    FURTHER,
    assert_same_training,
    plain_step,
    reference_steps,
    sharded_steps,
    whole_step,
)
from tests.ranks import run_ranks

CASES: dict[str, tuple[Any, Any]] = {
    # the batch, the model
    "hard": (hard_batch, tiny_model),
    "left padded": (left_padded, tiny_model),
    "one image": (one_image, partial(tiny_model, text=llama())),
    "text alone": (text_only, tiny_model),
    "instructed": (instructed, partial(tiny_model, "instructblip")),
    "videos": (videos, partial(tiny_model, "instructblipvideo", text=llama())),
}
METHODS = ("ulysses", "ring", "lvx")


def rules(method: str, ranks: int, stage: int = 0) -> dict[str, Any]:
    return ds_config(stage=stage, sp_size=ranks, self_attn=method)


def for_ranks(batch: Batch) -> Batch:
    """As the processor returns it: without images there are no pixels."""
    if batch["pixel_values"].shape[0] > 0:
        return batch
    return {key: value for key, value in batch.items() if key != "pixel_values"}


@functools.cache
def reference(name: str) -> dict[str, Any]:
    make, model = CASES[name]
    return reference_steps([[for_one_process(make())]], model())


def step_each(ranks: int, offset: int) -> list[dict[str, Any]]:
    results = []
    for number, (make, model) in enumerate(CASES.values()):
        method = METHODS[(number + offset) % len(METHODS)]
        results.append(plain_step(rules(method, ranks), for_ranks(make()), model=model()))
    return results


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
    for name in ("hard", "instructed", "videos"):
        grads = reference(name)["grads"]
        silent = {each for each, grad in grads.items() if not grad.any()}
        # The Q-Former drops the instruction's part of its last layer.
        last = "qformer.encoder.layer.1."
        text = (f"{last}intermediate.", f"{last}output.")
        assert {each for each in silent if not each.startswith(text)} == set(), name


def step_local(cuts: list[list[int]], make: Any, model: Any) -> dict[str, Any]:
    """The images of each sample that are on their ranks already, with their numbers by sample."""
    rank, batch = torch.distributed.get_rank(), make()
    pixels = batch["pixel_values"]
    if pixels.ndim == 5:
        pixels = pixels.flatten(0, 1)
    local = {
        **batch,
        "pixel_values": torch.cat([pixels[first:last] for first, last in cuts[rank]]),
        "images_per_sample": torch.tensor([last - first for first, last in cuts[rank]]),
    }
    return plain_step(rules("ring", 2), local, frames="local", model=model())


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("hard", [[(0, 0), (1, 3), (4, 4)], [(0, 1), (3, 4), (4, 4)]]),
        ("videos", [[(0, 1), (3, 6)], [(1, 3), (6, 6)]]),
    ],
)
def test_images_that_are_on_their_ranks_already(name: str, cuts: Any) -> None:
    results = run_ranks(step_local, 2, cuts, *CASES[name])
    assert_same_training(results, reference(name), sp_size=2)


# ---- a text that is not split


def whole_text(stage: int) -> list[dict[str, Any]]:
    """A step by itself, two of an engine, and one of a trainer's loss; of the logits, the same on
    all ranks, one rank's."""
    config = ds_config(stage=stage, sp_size=2, self_attn="ring")
    del config["ds_lvx"]["layers"][1]
    make = partial(tiny_model, "instructblip", text=t5())
    two = [[answers(6)], [answers(7)]]
    results = [
        plain_step(config, answers(6), model=make()),
        sharded_steps(config, two, model=make()),
        whole_step(config, answers(6), make=make),
    ]
    if torch.distributed.get_rank() > 0:
        for result in results[:2]:
            result["logits"] = [logits[:, :0] for logits in result["logits"]]
    return results


@pytest.mark.parametrize(
    "stage",
    [pytest.param(1, marks=pytest.mark.exhaustive), pytest.param(3, marks=pytest.mark.slow)],
)
def test_a_language_model_with_an_encoder_runs_whole_on_every_rank(stage: int) -> None:
    results = run_ranks(whole_text, 2, stage)
    one, two = [[answers(6)]], [[answers(6)], [answers(7)]]
    for index, batches in enumerate((one, two, one)):
        expected = reference_steps(batches, tiny_model("instructblip", text=t5()))
        assert_same_training([each[index] for each in results], expected, sp_size=2)


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
        own = [[for_one_process(each) for each in step] for step in batches]
        expected = reference_steps(own, make())
        try:
            assert_same_training([each[index] for each in results], expected, sp_size=sp_size)
        except AssertionError as error:
            raise AssertionError(f"job {index}, {config}: {error}") from error


def checkpointed(make: Any) -> Any:
    model = make()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def frozen_tower(make: Any) -> Any:
    model = make()
    model.vision_model.requires_grad_(False)
    return model


def section(config: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {**config, "activation_checkpointing": settings}


@pytest.mark.slow
@FURTHER
def test_training_equals_one_process(which: slice) -> None:
    """Two steps: stages, methods, checkpoints, LoRA, a frozen tower, families."""
    two = [[hard_batch(0)], [left_padded(1)]]
    clips = [[videos(0)], [videos(1)]]
    of_videos = partial(tiny_model, "instructblipvideo", text=llama())
    jobs = [
        (rules("ulysses", 2, 3), tiny_model, [*two, [text_only()]]),
        (rules("ring", 2, 0), partial(frozen_tower, tiny_model), two),
        (rules("ulysses", 2, 2), partial(checkpointed, lora_model), two),
        (section(rules("ring", 2, 1)), tiny_model, two),
        (section(rules("ulysses", 2, 3), partition_activations=True), of_videos, clips),
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
