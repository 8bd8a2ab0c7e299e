"""Qwen2.5-VL on sharded batches computes what the model computes in one process; more is in
test_concatenated.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from ds_lvx import apply, gather_sequence, owned
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.sharding import shard_batch
from ds_lvx.whole_batches import WholeBatches
from tests.models import concatenated_case as case
from tests.models.mllama_case import assert_same_training, further, plain_step, reference_steps
from tests.models.qwen2_5_vl_case import (
    IMAGE,
    MERGE,
    VIDEO,
    frozen_tower,
    hard_batch,
    left_padded,
    lora_model,
    one_image,
    text_only,
    tiny_model,
)
from tests.ranks import run_ranks

NAME = "qwen2_5_vl"
rules = partial(case.rules, NAME)


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
    grids = {IMAGE: iter(batch["image_grid_thw"]), VIDEO: iter(batch["video_grid_thw"])}
    keys = {IMAGE: "pixel_values", VIDEO: "pixel_values_videos"}
    found = []
    for row in batch["input_ids"].tolist():
        each, place = [], 0
        while place < len(row):
            token = row[place]
            place += 1
            if token in keys:
                t, h, w = next(grids[token]).tolist()
                each += [(keys[token], h * w, h * w // MERGE**2)] * t
                place += t * h * w // MERGE**2 - 1
        found.append(each)
    return found


def step_local() -> dict[str, Any]:
    batch = local_units(hard_batch(5))
    return plain_step(rules("lvx", 2), batch, frames="local", model=tiny_model())


def test_frames_that_are_on_their_ranks_already() -> None:
    alone = reference_steps([[hard_batch(5)]], tiny_model())
    assert_same_training(run_ranks(step_local, 2), alone, sp_size=2)


def logits_in_order() -> list[Any]:
    model, groups = tiny_model(), SequenceParallelGroups(2)
    session = apply(model, rules("ring", 2), groups=groups)
    shard = shard_batch(left_padded(), model=model)
    whole = gather_sequence(model(**shard).logits, shard=shard).detach()
    hooks = WholeBatches(model, session, averages=False)  # what Trainer and accelerate put on it
    with torch.no_grad():
        out = model.eval()(**left_padded())
    hooks.remove()
    session.close()
    groups.close()
    return [whole, out.logits.detach(), out.loss.item(), left_padded()["attention_mask"]]


def test_logits_come_in_the_order_of_the_text() -> None:
    alone = reference_steps([[left_padded()]], tiny_model())
    for *wholes, loss, mask in run_ranks(logits_in_order, 2):
        there = mask.bool()
        assert loss == pytest.approx(alone["losses"][0][0], abs=1e-5)
        for whole in wholes:
            wanted = alone["logits"][0][0][there]
            torch.testing.assert_close(whole[there], wanted, atol=1e-5, rtol=1e-5)
            assert not whole[~there].any()


# ---- training


@pytest.mark.slow
@further(3)
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


@pytest.mark.slow
@pytest.mark.parametrize("sp_size", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_replica_without_images_beside_one_with_images(sp_size: int) -> None:
    batches = [[hard_batch(0), text_only()], [text_only(), one_image()]]
    jobs = [(rules("lvx", sp_size, 3), tiny_model)]
    case.check(jobs, ranks=2 * sp_size, batches=batches, sp_size=sp_size)
