"""Qwen3-VL on sharded batches computes what the model computes in one process."""

from __future__ import annotations

import functools
from functools import partial
from itertools import groupby
from typing import Any

import pytest
import torch

from ds_lvx import gather_sequence, owned
from ds_lvx.config import LVXConfig
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.models import patch_model
from ds_lvx.sharding import shard_batch
from tests.models import concatenated_case as case
from tests.models.mllama_case import (
    FURTHER,
    assert_same_training,
    plain_step,
    reference_steps,
)
from tests.models.qwen3_vl_case import (
    IMAGE,
    MERGE,
    VIDEO,
    frozen_tower,
    hard_batch,
    left_padded,
    lora_model,
    one_image,
    one_video,
    text_only,
    tiny_model,
)
from tests.ranks import run_ranks

BATCHES = (hard_batch, left_padded, one_image, one_video, text_only)
NAME = "qwen3_vl"
rules = partial(case.rules, NAME)


@functools.cache
def expected() -> dict[str, Any]:
    return case.references(BATCHES, tiny_model)


@pytest.mark.parametrize(
    ("ranks", "offset"),
    [
        (1, 1),
        pytest.param(2, 0, marks=pytest.mark.slow),
        *(pytest.param(3, n, marks=pytest.mark.exhaustive) for n in range(4)),
    ],
)
def test_every_kind_of_batch_equals_one_process(ranks: int, offset: int) -> None:
    case.check_each(NAME, tiny_model, BATCHES, expected(), ranks=ranks, offset=offset)


def test_reference_has_gradients_everywhere() -> None:
    """Else the comparisons compare zeros."""
    silent = {name for name, grad in expected()["hard_batch"]["grads"].items() if not grad.any()}
    assert silent == set()


# ---- frames that are on their ranks already


def local_units(batch: dict[str, Any]) -> dict[str, Any]:
    """This rank's images and temporal patches, by `ds_lvx.owned`: sample by sample."""
    model, sizes = tiny_model(), units_of(batch)
    mine = [owned([tokens for _, _, tokens in each], model=model) for each in sizes]
    rows: dict[str, list[Any]] = {"pixel_values": [], "pixel_values_videos": []}
    starts = dict.fromkeys(rows, 0)
    for each, held in zip(sizes, mine, strict=True):
        for number, (key, count, _) in enumerate(each):
            if number in held:
                rows[key].append(batch[key][starts[key] : starts[key] + count])
            starts[key] += count
    return {**batch, **{key: torch.cat(part) if part else None for key, part in rows.items()}}


def units_of(batch: dict[str, Any]) -> list[list[tuple[str, int, int]]]:
    """Of each sample its units: where the pixels are, their rows, and their tokens."""
    keys = {IMAGE: "pixel_values", VIDEO: "pixel_values_videos"}
    found = []
    for row in batch["input_ids"].tolist():
        runs = [(token, len(list(run))) for token, run in groupby(row) if token in keys]
        found.append([(keys[token], count * MERGE**2, count) for token, count in runs])
    return found


def step_local() -> dict[str, Any]:
    batch = local_units(hard_batch(5))
    return plain_step(rules("lvx", 2), batch, frames="local", model=tiny_model())


def test_frames_that_are_on_their_ranks_already() -> None:
    alone = reference_steps([[hard_batch(5)]], tiny_model())
    assert_same_training(run_ranks(step_local, 2), alone, sp_size=2)


def test_no_visual_embedding_is_sent() -> None:
    assert run_ranks(case.bytes_of_forward, 2, NAME, tiny_model, one_video()) == [0, 0]


def logits_in_order() -> list[Any]:
    model, groups = tiny_model(), SequenceParallelGroups(2)
    patch = patch_model(model, LVXConfig.from_ds_config(rules("ring", 2)), groups)
    shard = shard_batch(left_padded(), model=model)
    whole = gather_sequence(model(**shard).logits, shard=shard).detach()
    patch.unpatch()
    groups.close()
    return [whole, left_padded()["attention_mask"]]


def test_logits_come_in_the_order_of_the_text() -> None:
    for whole, mask in run_ranks(logits_in_order, 2):
        there = mask.bool()
        torch.testing.assert_close(
            whole[there], expected()["left_padded"]["logits"][0][0][there], atol=1e-5, rtol=1e-5
        )
        assert not whole[~there].any()


# ---- training


@pytest.mark.slow
@FURTHER
def test_training_equals_one_process(which: slice) -> None:
    """Two steps: methods, stages, checkpoints, LoRA, a frozen tower."""
    jobs = [
        (rules("lvx", 2, 3), tiny_model),
        (rules("ulysses", 2, 2), partial(case.checkpointed, lora_model)),
        (case.section(rules("lvx", 2, 1), partition_activations=True), frozen_tower),
        (case.section(rules("ring", 2, 3)), tiny_model),
        (rules("ring", 2, 0), partial(case.checkpointed, tiny_model, reentrant=True)),
    ]
    case.check(jobs[which], ranks=2, batches=[[hard_batch(0)], [left_padded(1)]], sp_size=2)


@pytest.mark.exhaustive
def test_every_stage_equals_one_process() -> None:
    jobs = [(rules("lvx", 3, stage), tiny_model) for stage in range(4)]
    case.check(jobs, ranks=3, batches=[[hard_batch(0)], [left_padded(1)]], sp_size=3)


@pytest.mark.exhaustive
def test_a_rank_without_images_trains_along() -> None:
    jobs = [(rules("lvx", 3, 3), tiny_model), (rules("ring", 3, 0), tiny_model)]
    case.check(jobs, ranks=3, batches=[[one_image(7)], [text_only(8)]], sp_size=3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("sp_size", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_replica_without_images_beside_one_with_images(sp_size: int) -> None:
    batches = [[hard_batch(0), text_only()], [text_only(), one_image()]]
    jobs = [(rules("lvx", sp_size, 3), tiny_model)]
    case.check(jobs, ranks=2 * sp_size, batches=batches, sp_size=sp_size)
