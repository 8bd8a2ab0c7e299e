"""MOSS-VL on sharded batches computes what the model computes in one process."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import pytest
import torch

from ds_lvx.sharding import shard_batch
from tests.models.mllama_case import (
    assert_same_training,
    end_engine,
    plain_step,
    reference_steps,
    sharded_steps,
    start_engine,
)
from tests.models.moss_vl_case import (
    Batch,
    ds_config,
    hard_batch,
    left_padded,
    lora_model,
    make_batch,
    one_image,
    tiny_model,
)
from tests.ranks import run_ranks

RECOMPUTE: dict[str, Any] = {"method": "lvx", "recompute_kv": True}
RULES: dict[str, tuple[dict[str, Any], str]] = {
    # the rule of the cross-attention layers, the method of the text layers
    "chunks": ({**RECOMPUTE, "kv_chunk_tokens": 5, "features": "offload"}, "ulysses"),
    "lvx": ({"method": "lvx", "schedule": "ring"}, "ring"),
    "ulysses": ({"method": "ulysses"}, "lvx"),
    "ring": ({"method": "ring"}, "ring"),
    "recompute": (RECOMPUTE, "ulysses"),
}


def rules(name: str, ranks: int, stage: int = 0) -> dict[str, Any]:
    cross, self_attn = RULES[name]
    return ds_config(stage=stage, sp_size=ranks, cross=cross, self_attn=self_attn)


def without(batch: Batch, key: str) -> Batch:
    return {name: value for name, value in batch.items() if name != key}


# ---- every kind of batch


def text_only() -> Batch:
    batch = hard_batch(3)
    text = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    return {**text, "input_ids": text["input_ids"].clamp(max=190)}


def unpadded() -> Batch:
    """A whole number of tokens for every rank; a video alone."""
    return make_batch([[1, (6, 2, 4), 5]], seed=4)


BATCHES = {
    make.__name__: make for make in (hard_batch, left_padded, one_image, text_only, unpadded)
}


@functools.cache
def reference(name: str) -> dict[str, Any]:
    return reference_steps([[BATCHES[name]()]], tiny_model())


def step_each(ranks: int, offset: int) -> list[dict[str, Any]]:
    order = list(RULES) * 2
    return [
        plain_step(rules(order[i + offset], ranks), make(), model=tiny_model())
        for i, make in enumerate(BATCHES.values())
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "offset"),
    [(2, 0), *(pytest.param(ranks, ranks, marks=pytest.mark.exhaustive) for ranks in (1, 3))],
)
def test_every_kind_of_batch_equals_one_process(ranks: int, offset: int) -> None:
    results = run_ranks(step_each, ranks, ranks, offset)
    for index, name in enumerate(BATCHES):
        mine = [each[index] for each in results]
        try:
            assert_same_training(mine, reference(name), sp_size=ranks)
        except AssertionError as error:
            raise AssertionError(f"{name} on {ranks} ranks: {error}") from error
        if name != "text_only":
            assert all(result["missing"] == [] for result in mine), name


def test_reference_has_gradients_everywhere() -> None:
    """Else the comparisons compare zeros."""
    silent = {name for name, grad in reference("hard_batch")["grads"].items() if not grad.any()}
    assert silent == set()


def frozen_model() -> Any:
    model = tiny_model()
    model.model.visual.requires_grad_(False)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "ranks"), [(3, 2), pytest.param(2, 3, marks=pytest.mark.exhaustive)]
)
def test_a_frozen_tower_runs_over_some_frames_at_a_time(stage: int, ranks: int) -> None:
    batches = [[{**make(0), "vision_runs": 3}] for make in (hard_batch, one_image)]
    check([(rules("recompute", ranks, stage), frozen_model)], ranks=ranks, batches=batches)


# ---- frames that are on their ranks already


def local_frames(batch: Batch, cuts: list[list[int]], rank: int) -> Batch:
    """Sample b's frames ``cuts[b][rank]`` to ``cuts[b][rank + 1]``, each a row of its own."""
    frames = [row for row in batch["grid_thw"].tolist() for _ in range(row[0])]
    pixels = list(batch["pixel_values"].split([h * w for _, h, w in frames]))
    media = iter(batch["grid_thw"][:, 0].tolist())
    counts = [sum(next(media) for _ in range(n)) for n in batch["media_nums_per_sample"]]
    mine, first = [], 0
    for count, cut in zip(counts, cuts, strict=True):
        mine += list(range(first, first + count))[cut[rank] : cut[rank + 1]]
        first += count
    local = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    if not mine:
        return local
    return {
        **local,
        "pixel_values": torch.cat([pixels[frame] for frame in mine]),
        "grid_thw": torch.tensor([[1, *frames[frame][1:]] for frame in mine]),
        "media_nums_per_sample": [cut[rank + 1] - cut[rank] for cut in cuts],
    }


def step_local(cuts: list[list[int]]) -> dict[str, Any]:
    batch = local_frames(hard_batch(5), cuts, torch.distributed.get_rank())
    return plain_step(rules("recompute", 2), batch, frames="local", model=tiny_model())


@pytest.mark.parametrize("cuts", [[[0, 1, 4], [0, 4, 5], [0, 0, 1]], [[0, 4, 4]] * 3])
def test_local_frames_in_any_split_without_a_mask(cuts: list[list[int]]) -> None:
    cuts = [[min(cut, count) for cut in each] for each, count in zip(cuts, (4, 5, 1), strict=True)]
    expected = reference_steps([[hard_batch(5)]], tiny_model())
    assert_same_training(run_ranks(step_local, 2, cuts), expected, sp_size=2)


# ---- training


def train_each(jobs: list[tuple[dict[str, Any], Any]], batches: Any) -> list[dict[str, Any]]:
    return [sharded_steps(config, batches, model=make()) for config, make in jobs]


def check(jobs: list[tuple[dict[str, Any], Any]], *, ranks: int, batches: Any = None) -> None:
    batches = [[hard_batch(0)], [hard_batch(1)]] if batches is None else batches
    results = run_ranks(train_each, ranks, jobs, batches)
    for index, (config, make) in enumerate(jobs):
        plain = [[without(batch, "vision_runs") for batch in step] for step in batches]
        expected = reference_steps(plain, make())
        try:
            assert_same_training([each[index] for each in results], expected, sp_size=ranks)
        except AssertionError as error:
            raise AssertionError(f"{config}: {error}") from error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "name"),
    [
        ((3,), "recompute"),
        pytest.param((0, 1, 2), "recompute", marks=pytest.mark.exhaustive),
        pytest.param((2,), "lvx", marks=pytest.mark.exhaustive),
        pytest.param((3,), "ring", marks=pytest.mark.exhaustive),
        pytest.param((1,), "ulysses", marks=pytest.mark.exhaustive),
    ],
)
def test_training_equals_one_process(stages: tuple[int, ...], name: str) -> None:
    check([(rules(name, 2, stage), tiny_model) for stage in stages], ranks=2)


@pytest.mark.exhaustive
def test_a_rank_without_frames_trains_along() -> None:
    batches = [[one_image(7)], [hard_batch(2)]]
    jobs = [(rules(name, 3, 3), tiny_model) for name in ("chunks", "lvx")]
    check(jobs, ranks=3, batches=batches)


def checkpointed(make: Any) -> Any:
    model = make()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.mark.exhaustive
def test_lora_under_checkpoints_equals_one_process() -> None:
    """A layer that runs again in backward is handed the batch again."""
    config = rules("chunks", 2, 2)
    section = {**config, "activation_checkpointing": {}}
    check([(config, partial(checkpointed, lora_model)), (section, tiny_model)], ranks=2)


def two_batches_in_flight() -> list[dict[str, torch.Tensor]]:
    """Gradients of two forwards whose backwards come later, in the other order."""
    section = {**rules("recompute", 2, 0), "activation_checkpointing": {}}
    engine = start_engine(section, tiny_model())
    model, gradients = engine.module, []
    shards = [shard_batch(batch, model=model) for batch in (hard_batch(0), left_padded(1))]
    losses = [model(**shard).loss for shard in shards]
    for loss in reversed(losses):
        model.zero_grad()
        loss.backward()
        sums = {n: engine.ds_lvx.groups.channel.all_reduce(p.grad) for n, p in named(model)}
        gradients.append(sums)
    end_engine(engine)
    return gradients[::-1]


def named(model: Any) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in model.named_parameters() if p.grad is not None]


@pytest.mark.slow
def test_a_layer_that_runs_again_gets_its_own_batch() -> None:
    for result in run_ranks(two_batches_in_flight, 2):
        for batch, gradients in zip((hard_batch(0), left_padded(1)), result, strict=True):
            expected = reference_steps([[batch]], tiny_model())["grads"]
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5, msg=name)
