"""What holds for every family whose visual tokens stand among the text's; more is beside each."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch

from ds_lvx import gather_sequence
from ds_lvx.config import LVXConfig
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.models import patch_model
from ds_lvx.sharding import shard_batch
from tests.models import concatenated_case as case
from tests.models.mllama_case import FURTHER
from tests.ranks import run_ranks

NAMES = (
    "qwen3_vl",
    "internvl",
    "llava_onevision",
    pytest.param("qwen2_vl", marks=pytest.mark.exhaustive),  # Qwen2.5-VL without windows
    pytest.param("qwen3_vl_moe", marks=pytest.mark.exhaustive),
    "qwen3_5",
    "glm4v",
    pytest.param("qwen3_5_moe", marks=pytest.mark.exhaustive),
    pytest.param("glm4v_moe", marks=pytest.mark.exhaustive),
    "gemma3",
    "video_llama_3",
    "gemma4",
    pytest.param("smolvlm", marks=pytest.mark.exhaustive),  # whose batches are InternVL's
)
ALL = pytest.mark.parametrize("name", ["qwen2_5_vl", *NAMES])
OTHERS = pytest.mark.parametrize("name", NAMES)  # test_qwen2_5_vl.py asks for more


def of(name: str) -> Any:
    return import_module(f"tests.models.{name}_case")


@OTHERS
def test_no_visual_embedding_is_sent(name: str) -> None:
    given = name, of(name).tiny_model, of(name).one_video()
    assert run_ranks(case.bytes_of_forward, 2, *given) == [0, 0]


def logits_in_order(name: str) -> list[Any]:
    model, groups = of(name).tiny_model(), SequenceParallelGroups(2)
    patch = patch_model(model, LVXConfig.from_ds_config(case.rules(name, "ring", 2)), groups)
    batch = of(name).left_padded()
    shard = shard_batch(batch, model=model)
    whole = gather_sequence(model(**shard).logits, shard=shard).detach()
    patch.unpatch()
    groups.close()
    return [whole, batch["attention_mask"]]


@OTHERS
def test_logits_come_in_the_order_of_the_text(name: str) -> None:
    alone = of(name).tiny_model()(**of(name).left_padded()).logits.detach()
    for whole, mask in run_ranks(logits_in_order, 2, name):
        there = mask.bool()
        torch.testing.assert_close(whole[there], alone[there], atol=1e-5, rtol=1e-5)
        assert not whole[~there].any()


def two(name: str) -> list[list[Any]]:
    return [[of(name).hard_batch(0)], [of(name).left_padded(1)]]


@pytest.mark.slow
@FURTHER
@OTHERS
def test_training_equals_one_process(name: str, which: slice) -> None:
    """Two steps: methods, stages, checkpoints, LoRA, a frozen tower."""
    rules, tiny_model = partial(case.rules, name), of(name).tiny_model
    jobs = [
        (rules("lvx", 2, 3), tiny_model),
        (rules("ulysses", 2, 2), partial(case.checkpointed, of(name).lora_model)),
        (case.section(rules("lvx", 2, 1), partition_activations=True), of(name).frozen_tower),
        (case.section(rules("ring", 2, 3)), tiny_model),
        (rules("ring", 2, 0), partial(case.checkpointed, tiny_model, reentrant=True)),
    ]
    case.check(jobs[which], ranks=2, batches=two(name), sp_size=2)


@pytest.mark.exhaustive
@ALL
def test_every_stage_equals_one_process(name: str) -> None:
    jobs = [(case.rules(name, "lvx", 3, stage), of(name).tiny_model) for stage in range(4)]
    case.check(jobs, ranks=3, batches=two(name), sp_size=3)


@pytest.mark.exhaustive
@ALL
def test_a_rank_without_images_trains_along(name: str) -> None:
    jobs = [(case.rules(name, *each), of(name).tiny_model) for each in (("lvx", 3, 3), ("ring", 3))]
    batches = [[of(name).one_image(7)], [of(name).text_only(8)]]
    case.check(jobs, ranks=3, batches=batches, sp_size=3)
