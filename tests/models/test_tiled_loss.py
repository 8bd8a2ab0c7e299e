"""Logits and loss in tiles: the training of one process, and no tensor of all logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import ds_lvx
from ds_lvx.config import LVXConfig
from ds_lvx.models import patch_model
from tests.largest import LargestTensor
from tests.models import (
    blip_case,
    idefics_case,
    mllama_case,
    moss_vl_case,
    mplugowl3_case,
    openflamingo_case,
    qwen_vl_case,
    t5gemma2_case,
)
from tests.models.alone_case import OneRank, patched_by
from tests.models.mllama_case import assert_same_training, reference_steps, sharded_steps
from tests.ranks import run_ranks

CASES: dict[str, ModuleType] = {
    "mllama": mllama_case,
    "blip": blip_case,
    "idefics": idefics_case,
    "moss_vl": moss_vl_case,
    "mplugowl3": mplugowl3_case,
    "openflamingo": openflamingo_case,
    "qwen_vl": qwen_vl_case,
    "t5gemma2": t5gemma2_case,
}


def config(case: ModuleType, stage: int, sp_size: int, tiles: int) -> dict[str, Any]:
    rules: dict[str, Any] = {"self_attn": "ring"}
    if case not in (blip_case, qwen_vl_case):
        rules["cross"] = {"method": "lvx"}
    found: dict[str, Any] = case.ds_config(stage=stage, sp_size=sp_size, **rules)
    found["ds_lvx"]["loss_tiles"] = tiles
    return found


@functools.cache
def batches(name: str) -> list[list[dict[str, Any]]]:
    return [[CASES[name].hard_batch(seed)] for seed in (0, 1)]


def frozen_head() -> Any:
    model = mllama_case.tiny_model()
    model.lm_head.requires_grad_(False)
    return model


def adapted_head() -> Any:
    """LoRA in the head itself."""
    torch.manual_seed(3)
    adapters = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    return get_peft_model(mllama_case.tiny_model(), adapters)


def saved_head() -> Any:
    """LoRA beside a head that trains whole, by peft's copy of it."""
    torch.manual_seed(3)
    adapters = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False
    )
    return get_peft_model(mllama_case.tiny_model(), adapters)


HEADS = {
    "saved": saved_head,
    "frozen": frozen_head,
    "adapted": adapted_head,
}  # of mllama; else as it is


def train_each(name: str, jobs: list[tuple[dict[str, Any], str]]) -> list[dict[str, Any]]:
    made = [HEADS.get(head, CASES[name].tiny_model)() for _, head in jobs]
    return [
        sharded_steps(each, batches(name), model=model)
        for (each, _), model in zip(jobs, made, strict=True)
    ]


def check(name: str, jobs: list[tuple[dict[str, Any], str]], *, ranks: int) -> None:
    answers = run_ranks(train_each, ranks, name, jobs)
    # Qwen-VL's own forward opens the files of its images.
    hidden = {"pixel_values"} if name == "qwen_vl" else set()
    plain = [[{k: v for k, v in b.items() if k not in hidden} for b in s] for s in batches(name)]
    for index, (_, head) in enumerate(jobs):
        make: Callable[[], Any] = HEADS.get(head, CASES[name].tiny_model)
        mine = [each[index] for each in answers]
        assert all(logits.shape[1] == 0 for each in mine for logits in each["logits"])
        expected = {**reference_steps(plain, make()), "logits": []}
        assert_same_training(mine, expected, sp_size=ranks)


@pytest.mark.slow
def test_every_kind_of_head() -> None:
    """More tiles than tokens; gradients are those of one process to 1e-5."""
    jobs = [
        (config(mllama_case, 1, 2, 2), "frozen"),
        (config(mllama_case, 2, 2, 100), "adapted"),
        (config(mllama_case, 3, 2, 3), "saved"),
    ]
    check("mllama", jobs, ranks=2)


@pytest.mark.exhaustive
def test_a_frozen_head_that_is_partitioned() -> None:
    check("mllama", [(config(mllama_case, 3, 2, 2), "frozen")], ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "tiles"), [(1, 3), pytest.param(3, 2, marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("name", [name for name in CASES if name != "mllama"])
def test_every_family_that_makes_a_loss_its_own_way(name: str, stage: int, tiles: int) -> None:
    check(name, [(config(CASES[name], stage, 2, tiles), "")], ranks=2)


def test_a_head_may_share_its_weight_with_the_embeddings() -> None:
    """T5Gemma 2's does, in the test above."""
    model = t5gemma2_case.tiny_model()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def patched(model: Any, tiles: int) -> Any:
    return patched_by(config(mllama_case, 0, 1, tiles), model)


@pytest.mark.parametrize("tiles", [1, 4])
def test_the_largest_tensor_is_a_tile_of_logits(tiles: int) -> None:
    model = mllama_case.tiny_model()
    text, words = model.config.text_config, 5000
    model.lm_head = torch.nn.Linear(text.hidden_size, words, bias=False)
    text.vocab_size = words
    patched(model, tiles)
    batch = mllama_case.make_batch([[0, 3]], length=64, num_tiles=[[1, 2]])
    shard = ds_lvx.shard_batch(batch, model=model)
    with LargestTensor() as largest:
        model(**shard).loss.backward()
    assert largest.elements == max(64 // tiles, text.hidden_size) * words


def test_without_gradients_or_labels_logits_are_whole() -> None:
    model = mllama_case.tiny_model()
    patched(model, 2)
    batch = mllama_case.hard_batch(0)
    shard = ds_lvx.shard_batch(batch, model=model)
    tiled = model(**shard)
    with torch.no_grad():
        whole = model(**shard)
    assert tiled.logits.shape[1] == 0
    assert whole.logits.shape[:2] == batch["input_ids"].shape
    torch.testing.assert_close(tiled.loss, whole.loss)
    shard["shift_labels"].fill_(-100)  # which backward needs as they were
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        tiled.loss.backward()
    unlabelled = {key: value for key, value in batch.items() if key != "labels"}
    assert model(**ds_lvx.shard_batch(unlabelled, model=model)).logits.shape[1] > 0


def test_it_comes_off() -> None:
    model = mllama_case.tiny_model()
    before = [sorted(vars(module)) for module in (model, model.lm_head)]
    patched(model, 2).unpatch()
    assert [sorted(vars(module)) for module in (model, model.lm_head)] == before
    assert not model.lm_head._forward_pre_hooks
    assert not model._forward_hooks


def test_a_loss_made_elsewhere_is_no_loss_in_tiles() -> None:
    model = mllama_case.tiny_model()
    patched(model, 2)
    model.loss_function = lambda logits, labels, *args, **kwargs: logits.sum()
    with pytest.raises(NotImplementedError, match="loss_tiles for a Mllama"):
        model(**ds_lvx.shard_batch(mllama_case.hard_batch(0), model=model))


def test_a_whole_text_has_no_tiles() -> None:
    """A BLIP on Flan-T5: every rank computes the loss of all."""
    groups: Any = OneRank()
    rules = LVXConfig.from_ds_config(config(blip_case, 0, 1, 2))
    rules = rules.model_copy(update={"layers": rules.layers[:1]})
    with pytest.raises(NotImplementedError, match="loss_tiles for a text model that runs whole"):
        patch_model(blip_case.tiny_model(text=blip_case.t5()), rules, groups)
