"""idefics on sharded batches computes what the model computes in one process."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import pytest
import torch

from tests.models.idefics_case import (
    Batch,
    all_before,
    ds_config,
    hard_batch,
    left_padded,
    lora_model,
    one_image,
    text_only,
    tiny_model,
)
from tests.models.mllama_case import (
    FURTHER,
    assert_same_training,
    plain_step,
    reference_steps,
    sharded_steps,
)
from tests.ranks import run_ranks

RECOMPUTE: dict[str, Any] = {"method": "lvx", "recompute_kv": True}
RULES: dict[str, tuple[dict[str, Any], str]] = {
    # the rule of the cross-attention layers, the method of the text layers
    "chunks": ({**RECOMPUTE, "kv_chunk_tokens": 2, "features": "offload"}, "ulysses"),
    "lvx": ({"method": "lvx", "schedule": "ring"}, "ring"),
    "ulysses": ({"method": "ulysses"}, "lvx"),
    "ring": ({"method": "ring"}, "ring"),
    "recompute": (RECOMPUTE, "ulysses"),
}


def rules(name: str, ranks: int, stage: int = 0) -> dict[str, Any]:
    cross, self_attn = RULES[name]
    return ds_config(stage=stage, sp_size=ranks, cross=cross, self_attn=self_attn)


def without(batch: Batch, *keys: str) -> Batch:
    return {name: value for name, value in batch.items() if name not in keys}


def by_runs(batch: Batch) -> Batch:
    """The batch with the latest image of each token in the place of the mask."""
    mask = batch["image_attention_mask"]
    first = mask.argmax(dim=-1)
    seen = torch.stack([first, first + mask.any(dim=-1)], dim=-1)
    return {**without(batch, "image_attention_mask"), "visible_images": seen}


# ---- every kind of batch

BATCHES = {
    make.__name__: make for make in (hard_batch, left_padded, one_image, all_before, text_only)
}
OURS = {
    "left_padded": by_runs,
    "text_only": lambda b: without(b, "pixel_values", "image_attention_mask"),
}


@functools.cache
def reference(name: str) -> dict[str, Any]:
    return reference_steps([[BATCHES[name]()]], tiny_model())


def trained_only(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`plain_step` of all ranks without the gradients of what is frozen."""
    for result in results:
        result["grads"] = {k: v for k, v in result["grads"].items() if "post_layernorm" not in k}
    return results


def step_each(ranks: int, offset: int) -> list[dict[str, Any]]:
    results = []
    for (name, make), rule in zip(BATCHES.items(), (list(RULES) * 2)[offset:], strict=False):
        batch = OURS.get(name, dict)(make())
        results.append(plain_step(rules(rule, ranks), batch, model=tiny_model()))
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "offset"), [(2, 0), pytest.param(3, 3, marks=pytest.mark.exhaustive)]
)
def test_every_kind_of_batch_equals_one_process(ranks: int, offset: int) -> None:
    results = run_ranks(step_each, ranks, ranks, offset)
    for index, name in enumerate(BATCHES):
        mine = [each[index] for each in results]
        assert all("post_layernorm" in each for result in mine for each in result["missing"]), name
        try:
            assert_same_training(trained_only(mine), reference(name), sp_size=ranks)
        except AssertionError as error:
            raise AssertionError(f"{name} on {ranks} ranks: {error}") from error


def test_reference_has_gradients_everywhere() -> None:
    """Else the comparisons compare zeros."""
    silent = {name for name, grad in reference("hard_batch")["grads"].items() if not grad.any()}
    assert silent == set()


def step_local(cuts: list[int]) -> dict[str, Any]:
    rank, batch = torch.distributed.get_rank(), hard_batch(5)
    mine = batch["pixel_values"][:, cuts[rank] : cuts[rank + 1]]
    local = {**batch, "pixel_values": mine if mine.shape[1] > 0 else None}
    return plain_step(rules("recompute", 2), local, frames="local", model=tiny_model())


@pytest.mark.parametrize("cuts", [[0, 1, 3], [0, 0, 3]])
def test_images_that_are_on_their_ranks_already(cuts: list[int]) -> None:
    expected = reference_steps([[hard_batch(5)]], tiny_model())
    assert_same_training(trained_only(run_ranks(step_local, 2, cuts)), expected, sp_size=2)


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


def checkpointed(make: Any) -> Any:
    model = make()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def section(config: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {**config, "activation_checkpointing": settings}


def recomputed_text(config: dict[str, Any]) -> dict[str, Any]:
    config["ds_lvx"]["layers"][2].update(method="lvx", recompute_kv=True)
    return config


@pytest.mark.slow
@FURTHER
def test_training_equals_one_process(which: slice) -> None:
    """Two steps: methods, stages, checkpoints, LoRA, a model without a resampler, frozen text."""
    jobs = [
        (rules("recompute", 2, 3), tiny_model),
        (rules("ring", 2, 0), partial(tiny_model, alpha_type="vector", qk_layer_norms=False)),
        (rules("chunks", 2, 2), partial(checkpointed, lora_model)),
        (section(rules("lvx", 2, 3)), partial(tiny_model, use_resampler=False)),
        (section(rules("recompute", 2, 1), partition_activations=True), tiny_model),
        (recomputed_text(rules("ulysses", 2, 0)), partial(tiny_model, freeze_text_layers=True)),
    ]
    check(jobs[which], ranks=2, batches=[[hard_batch(0)], [left_padded(1)]], sp_size=2)


@pytest.mark.exhaustive
def test_every_stage_equals_one_process() -> None:
    jobs = [(rules("recompute", 3, stage), tiny_model) for stage in range(4)]
    check(jobs, ranks=3, batches=[[hard_batch(0)], [left_padded(1)]], sp_size=3)


@pytest.mark.exhaustive
def test_a_rank_without_images_trains_along() -> None:
    jobs = [(rules("recompute", 3, 3), tiny_model), (rules("lvx", 3, 0), tiny_model)]
    check(jobs, ranks=3, batches=[[one_image(7)], [text_only(8)]], sp_size=3)
