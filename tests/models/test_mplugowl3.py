"""mPLUG-Owl3 on sharded batches computes what the model computes in one process."""

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
from tests.models.mplugowl3_case import (
    Batch,
    ds_config,
    hard_batch,
    left_padded,
    lora_model,
    one_image,
    seen_by_nobody,
    text_only,
    tiny_model,
)
from tests.ranks import run_ranks

RECOMPUTE: dict[str, Any] = {"method": "lvx", "recompute_kv": True}
RULES: dict[str, tuple[dict[str, Any], str]] = {
    # the rule of the hyper layers, the method of the other text layers
    "chunks": ({**RECOMPUTE, "kv_chunk_tokens": 5}, "ulysses"),
    "lvx": ({"method": "lvx", "schedule": "ring"}, "ring"),
    "ring": ({"method": "ring"}, "lvx"),
    "recompute": (RECOMPUTE, "ulysses"),
}
UNUSED = "vision_model.encoder.layers.2."  # frozen: the model does not use it


def rules(name: str, ranks: int, stage: int = 0) -> dict[str, Any]:
    hyper, text = RULES[name]
    return ds_config(stage=stage, sp_size=ranks, cross=hyper, self_attn=text)


# ---- every kind of batch

BATCHES = {
    make.__name__: make for make in (hard_batch, left_padded, one_image, seen_by_nobody, text_only)
}


@functools.cache
def reference(name: str) -> dict[str, Any]:
    return reference_steps([[BATCHES[name]()]], tiny_model())


def trained_only(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`plain_step` of all ranks without the gradients of what is frozen."""
    for result in results:
        result["grads"] = {k: v for k, v in result["grads"].items() if not k.startswith(UNUSED)}
    return results


def step_each(ranks: int, offset: int) -> list[dict[str, Any]]:
    order = list(RULES) * 3
    return [
        plain_step(rules(rule, ranks), make(), model=tiny_model())
        for make, rule in zip(BATCHES.values(), order[offset:], strict=False)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "offset"),
    [(2, 0), *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in ((1, 3), (3, 1)))],
)
def test_every_kind_of_batch_equals_one_process(ranks: int, offset: int) -> None:
    results = run_ranks(step_each, ranks, ranks, offset)
    for index, name in enumerate(BATCHES):
        mine = trained_only([each[index] for each in results])
        try:
            assert_same_training(mine, reference(name), sp_size=ranks)
        except AssertionError as error:
            raise AssertionError(f"{name} on {ranks} ranks: {error}") from error
        missing = {n for each in mine for n in each["missing"] if not n.startswith(UNUSED)}
        assert missing == set(), name


def test_reference_has_gradients_everywhere() -> None:
    """Else the comparisons compare zeros."""
    silent = {name for name, grad in reference("hard_batch")["grads"].items() if not grad.any()}
    assert silent == set()


def test_a_padded_sample_has_the_loss_that_it_has_alone() -> None:
    """In the double; here by the comparisons with it."""
    batch, model = left_padded(), tiny_model()
    losses, labelled, first = [], [], 0
    for row, places in enumerate(batch["media_offset"]):
        here = batch["attention_mask"][row].bool()
        last = first + len(places)
        alone = {key: batch[key][row : row + 1, here] for key in ("input_ids", "labels")}
        places = places - int((~here).sum())
        pixels = batch["pixel_values"][first:last]
        losses.append(model(**alone, pixel_values=pixels, media_offset=[places]).loss)
        labelled.append((alone["labels"][:, 1:] != -100).sum())
        first = last
    total = sum(loss * count for loss, count in zip(losses, labelled, strict=True))
    torch.testing.assert_close(total / sum(labelled), model(**batch).loss)


def local_images(batch: Batch, cuts: list[list[int]], rank: int) -> Batch:
    """Sample b's images ``cuts[b][rank]`` to ``cuts[b][rank + 1]``."""
    counts = [len(places) for places in batch["media_offset"]]
    mine = [
        image
        for images, cut in zip(batch["pixel_values"].split(counts), cuts, strict=True)
        for image in images[cut[rank] : cut[rank + 1]]
    ]
    return {
        **batch,
        "pixel_values": torch.stack(mine) if mine else None,
        "images_per_sample": torch.tensor([cut[rank + 1] - cut[rank] for cut in cuts]),
    }


def step_local(cuts: list[list[int]]) -> dict[str, Any]:
    batch = local_images(hard_batch(5), cuts, torch.distributed.get_rank())
    return plain_step(rules("recompute", 2), batch, frames="local", model=tiny_model())


@pytest.mark.parametrize(
    "cuts", [[[0, 1, 4], [0, 1, 1], [0, 0, 0]], [[0, 0, 4], [0, 0, 1], [0] * 3]]
)
def test_images_that_are_on_their_ranks_already(cuts: list[list[int]]) -> None:
    expected = reference_steps([[hard_batch(5)]], tiny_model())
    assert_same_training(trained_only(run_ranks(step_local, 2, cuts)), expected, sp_size=2)


def wrong_local() -> str:
    batch = local_images(
        hard_batch(), [[0, 1, 2], [0, 1, 1], [0] * 3], torch.distributed.get_rank()
    )
    try:
        plain_step(rules("lvx", 2), batch, frames="local", model=tiny_model())
    except ValueError as error:
        return str(error)
    return ""


def test_images_that_are_on_no_rank_are_missed_on_all() -> None:
    for message in run_ranks(wrong_local, 2):
        assert (
            "got pixel_values of [2, 1, 0] images by sample, and media_offset of [4, 1, 0]"
            in message
        )


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


def frozen(part: str) -> Any:
    model = tiny_model()
    model.get_submodule(part).requires_grad_(False)
    return model


@pytest.mark.slow
@FURTHER
def test_training_equals_one_process(which: slice) -> None:
    """Two steps: methods, stages, checkpoints, LoRA, frozen parts."""
    jobs = [
        (rules("recompute", 2, 3), tiny_model),
        (rules("recompute", 2, 2), partial(frozen, "vision_model")),
        (rules("chunks", 2, 2), partial(checkpointed, lora_model)),
        (section(rules("lvx", 2, 3)), tiny_model),
        (rules("ring", 2, 0), partial(checkpointed, tiny_model, reentrant=True)),
        (
            section(rules("recompute", 2, 1), partition_activations=True),
            partial(frozen, "language_model"),
        ),
    ]
    check(jobs[which], ranks=2, batches=[[hard_batch(0)], [left_padded(1)]], sp_size=2)


@pytest.mark.exhaustive
def test_every_stage_equals_one_process() -> None:
    names = ("lvx", "recompute", "lvx", "recompute")
    jobs = [(rules(name, 3, stage), tiny_model) for stage, name in enumerate(names)]
    check(jobs, ranks=3, batches=[[hard_batch(0)], [left_padded(1)]], sp_size=3)


@pytest.mark.exhaustive
def test_a_rank_without_images_trains_along() -> None:
    jobs = [(rules("recompute", 3, 3), tiny_model), (rules("lvx", 3, 0), tiny_model)]
    check(jobs, ranks=3, batches=[[one_image(7)], [text_only(8)]], sp_size=3)


# ---- release 240728, whose hyper layers have a gate

GATED = partial(tiny_model, gated=True)
GATED_RULES = {
    **RULES,
    "ulysses": ({"method": "ulysses"}, "ulysses"),
    "auto": ({"method": "auto"}, "ring"),
}


def gated_rules(name: str, ranks: int, stage: int = 0) -> dict[str, Any]:
    hyper, text = GATED_RULES[name]
    return ds_config(stage=stage, sp_size=ranks, cross=hyper, self_attn=text)


@functools.cache
def gated_reference(name: str) -> dict[str, Any]:
    return reference_steps([[BATCHES[name]()]], GATED())


def gated_step_each(ranks: int, offset: int) -> list[dict[str, Any]]:
    order = (list(GATED_RULES) * 3)[offset:]
    return [
        plain_step(gated_rules(rule, ranks), make(), model=GATED())
        for make, rule in zip(BATCHES.values(), order, strict=False)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "offset"),
    [(2, 3), *(pytest.param(3, n, marks=pytest.mark.exhaustive) for n in (1, 5))],
)
def test_gated_layers_equal_one_process(ranks: int, offset: int) -> None:
    results = run_ranks(gated_step_each, ranks, ranks, offset)
    for index, name in enumerate(BATCHES):
        mine = trained_only([each[index] for each in results])
        try:
            assert_same_training(mine, gated_reference(name), sp_size=ranks)
        except AssertionError as error:
            raise AssertionError(f"{name} on {ranks} ranks: {error}") from error


def test_gated_reference_has_gradients_everywhere() -> None:
    grads = gated_reference("hard_batch")["grads"]
    assert any(name.endswith("self_attn.gate") for name in grads)
    assert all(grad.any() for grad in grads.values())


@pytest.mark.exhaustive
def test_gated_training_equals_one_process() -> None:
    jobs = [
        (gated_rules("recompute", 2, 3), GATED),
        (section(gated_rules("ulysses", 2, 2)), partial(checkpointed, GATED)),
    ]
    check(jobs, ranks=2, batches=[[hard_batch(0)], [text_only(1)]], sp_size=2)
