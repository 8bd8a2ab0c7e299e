"""OpenFlamingo on sharded batches computes what the model computes in one process."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import pytest
import torch
from transformers import MptForCausalLM

from tests.models.mllama_case import (
    FURTHER,
    assert_same_training,
    further,
    plain_step,
    reference_steps,
    sharded_steps,
)
from tests.models.openflamingo_case import (
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


# ---- every kind of batch


def without_images(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key != "vision_x"}


def learnt_by_tokens(batch: Batch) -> Batch:
    """Without the labels that padding on the left predicts.

    It sees nothing, and MPT's own code lets it attend to all tokens alike then.
    """
    labels = batch["labels"].clone()
    labels[:, 1:].masked_fill_(batch["attention_mask"][:, :-1] == 0, -100)
    return {**batch, "labels": labels}


NEOX = partial(tiny_model, "gpt_neox")
MPT = partial(tiny_model, "mpt")
CLIPPED = partial(
    tiny_model, "mpt", hidden_size=48, num_attention_heads=6, clip_qkv=0.6, softmax_scale=0.5
)
CASES: dict[str, tuple[Any, Any, Any]] = {
    # the batch; what ours is made of it; the model
    "hard": (hard_batch, dict, tiny_model),
    "left_padded": (left_padded, dict, NEOX),
    "one_image": (one_image, dict, NEOX),
    "text_only": (text_only, without_images, tiny_model),
    "all_before": (hard_batch, dict, all_before),
    "all_before_blank": (text_only, dict, partial(all_before, "gpt_neox")),
    "bias": (hard_batch, dict, MPT),
    "clipped_bias": (left_padded, learnt_by_tokens, CLIPPED),
}


@functools.cache
def reference(name: str) -> dict[str, Any]:
    make, ours, model = CASES[name]
    batch = ours(make()) if "bias" in name else make()
    return reference_steps([[batch]], model())


def as_seen(
    results: list[dict[str, Any]], expected: dict[str, Any], batches: list[list[Batch]]
) -> dict[str, Any]:
    """The expectation for an MPT, and the results of one replica, without logits of padding."""
    logits = []
    for step, (batch,) in enumerate(batches):
        valid = batch["attention_mask"][..., None]
        logits.append([expected["logits"][step][0] * valid])
        lengths = [result["logits"][step].shape[1] for result in results]
        order = results[0]["shards"][step]
        if order is not None:
            valid = valid[:, order[0].argsort()]
        for result, here in zip(results, valid.split(lengths, dim=1), strict=True):
            result["logits"][step] = result["logits"][step] * here
    return {**expected, "logits": logits}


def trained_only(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`plain_step` of all ranks without the gradients of what is frozen."""
    for result in results:
        result["grads"] = {k: v for k, v in result["grads"].items() if "vision_encoder" not in k}
    return results


def step_each(ranks: int, offset: int) -> list[dict[str, Any]]:
    results = []
    names = (list(RULES) * 3)[offset:]
    for (make, ours, model), rule in zip(CASES.values(), names, strict=False):
        results.append(plain_step(rules(rule, ranks), ours(make()), model=model()))
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "offset"), [(2, 0), pytest.param(3, 3, marks=pytest.mark.exhaustive)]
)
def test_every_kind_of_batch_equals_one_process(ranks: int, offset: int) -> None:
    results = run_ranks(step_each, ranks, ranks, offset)
    for index, name in enumerate(CASES):
        mine = [each[index] for each in results]
        assert all("vision_encoder" in each for result in mine for each in result["missing"]), name
        expected = reference(name)
        if "bias" in name:
            expected = as_seen(mine, expected, [[CASES[name][0]()]])
        try:
            assert_same_training(trained_only(mine), expected, sp_size=ranks)
        except AssertionError as error:
            raise AssertionError(f"{name} on {ranks} ranks: {error}") from error


@pytest.mark.parametrize("name", ["hard", "all_before"])
def test_reference_has_gradients_everywhere(name: str) -> None:
    """Else the comparisons compare zeros."""
    silent = {name for name, grad in reference(name)["grads"].items() if not grad.any()}
    assert silent == set()


def step_local(cuts: list[int]) -> list[dict[str, Any]]:
    rank, batch = torch.distributed.get_rank(), hard_batch(5)
    mine = batch["vision_x"][:, cuts[rank] : cuts[rank + 1]]
    local = {**batch, "vision_x": mine if mine.shape[1] > 0 else None}
    models = tiny_model(), all_before()
    return [plain_step(rules("recompute", 2), local, frames="local", model=m) for m in models]


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [[0, 1, 3], [0, 0, 3]])
def test_images_that_are_on_their_ranks_already(cuts: list[int]) -> None:
    results = run_ranks(step_local, 2, cuts)
    for place, model in enumerate((tiny_model(), all_before())):
        found = trained_only([each[place] for each in results])
        expected = reference_steps([[hard_batch(5)]], model)
        assert_same_training(found, expected, sp_size=2)


# ---- training


def train_each(jobs: list[tuple[dict[str, Any], Any]], batches: Any) -> list[dict[str, Any]]:
    results = []
    for config, make in jobs:
        model = make()
        results.append(sharded_steps(config, given(model, batches), model=model))
    return results


def is_mpt(model: Any) -> bool:
    return any(isinstance(each, MptForCausalLM) for each in model.modules())


def given(model: Any, batches: list[list[Batch]]) -> list[list[Batch]]:
    if not is_mpt(model):
        return batches
    return [[learnt_by_tokens(batch) for batch in step] for step in batches]


def check(
    jobs: list[tuple[dict[str, Any], Any]], *, ranks: int, batches: Any, sp_size: int
) -> None:
    results = run_ranks(train_each, ranks, jobs, batches)
    for index, (config, make) in enumerate(jobs):
        mine, model = [each[index] for each in results], make()
        expected = reference_steps(given(model, batches), model)
        if is_mpt(model):
            expected = as_seen(mine, expected, batches)
        try:
            assert_same_training(mine, expected, sp_size=sp_size)
        except AssertionError as error:
            raise AssertionError(f"job {index}, {config}: {error}") from error


def checkpointed(make: Any) -> Any:
    model = make()
    language = next(m for m in model.modules() if hasattr(m, "gradient_checkpointing_enable"))
    language.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def section(config: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {**config, "activation_checkpointing": settings}


def frozen_text(language: str) -> Any:
    """As the package trains: perceiver, gated layers and the text's embeddings."""
    model = tiny_model(language)
    model.lang_encoder.requires_grad_(False)
    model.lang_encoder.gated_cross_attn_layers.requires_grad_(True)
    model.lang_encoder.get_input_embeddings().requires_grad_(True)
    return model


@pytest.mark.slow
@further(3)
def test_training_equals_one_process(which: slice) -> None:
    """Two steps: recomputation, host features, checkpoints, LoRA, all images before."""
    jobs = [
        (rules("recompute", 2, 3), NEOX),
        (rules("chunks", 2, 2), partial(checkpointed, lora_model)),
        (section(rules("lvx", 2, 1)), all_before),
        (section(rules("lvx", 2, 3)), MPT),
    ]
    check(jobs[which], ranks=2, batches=[[hard_batch(0)], [left_padded(1)]], sp_size=2)


@pytest.mark.exhaustive
@FURTHER
def test_other_methods_train_as_one_process(which: slice) -> None:
    """Partitioned checkpoints and frozen text among them."""
    jobs = [
        (rules("ring", 2, 0), NEOX),
        (section(rules("recompute", 2, 1), partition_activations=True), NEOX),
        (rules("ulysses", 2, 0), partial(frozen_text, "gpt_neox")),
        (rules("ulysses", 2, 3), partial(frozen_text, "llama")),
        (rules("recompute", 2, 1), partial(lora_model, "mpt")),
        (rules("ulysses", 2, 3), partial(checkpointed, CLIPPED)),
    ]
    check(jobs[which], ranks=2, batches=[[hard_batch(0)], [left_padded(1)]], sp_size=2)


@pytest.mark.exhaustive
def test_every_stage_equals_one_process() -> None:
    jobs = [(rules("recompute", 2, stage), tiny_model) for stage in range(4)]
    check(jobs, ranks=2, batches=[[hard_batch(0)], [left_padded(1)]], sp_size=2)


@pytest.mark.exhaustive
def test_a_rank_without_images_trains_along() -> None:
    jobs = [(rules("recompute", 3, 3), tiny_model), (rules("lvx", 3, 0), NEOX)]
    check(jobs, ranks=3, batches=[[one_image(7)], [text_only(8)]], sp_size=3)


@pytest.mark.slow
@pytest.mark.parametrize("sp_size", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_replica_without_images_beside_one_with_images(sp_size: int) -> None:
    batches = [[hard_batch(0), text_only()], [text_only(), one_image()]]
    jobs = [(rules("lvx", sp_size, 3), tiny_model)]
    check(jobs, ranks=2 * sp_size, batches=batches, sp_size=sp_size)
