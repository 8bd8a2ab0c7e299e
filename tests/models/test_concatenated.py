"""What holds for every family whose visual tokens stand among the text's: on sharded batches it
computes what it computes in one process. What is a family's own is in its own file."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch

from ds_lvx import gather_sequence, owned
from ds_lvx.config import LVXConfig
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.models import patch_model
from ds_lvx.models.concatenated.family import Concatenated
from ds_lvx.models.registry import BUILT_IN, FAMILIES
from ds_lvx.sharding import shard_batch
from tests.models import concatenated_case as case
from tests.models.alone_case import assert_given_back, patched_by
from tests.models.mllama_case import FURTHER, assert_same_training, plain_step, reference_steps
from tests.ranks import run_ranks

NAMES = (
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "llava_onevision",
    "qwen2_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "glm4v",
    "qwen3_5_moe",
    "glm4v_moe",
    "gemma3",
    "video_llama_3",
    "gemma4",
    "smolvlm",
)
LIKE_ANOTHER = {
    "qwen2_vl",  # Qwen2.5-VL without windows
    "qwen3_vl_moe",
    "qwen3_5_moe",
    "glm4v_moe",
    "smolvlm",  # whose batches are InternVL's
}


def asked(names: Sequence[str]) -> Any:
    """Families that are like another are exhaustive."""
    marks = {name: [pytest.mark.exhaustive] if name in LIKE_ANOTHER else [] for name in names}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=marks[n]) for n in names])


ALL, OTHERS = asked(NAMES), asked(NAMES[1:])  # test_qwen2_5_vl.py asks for more


def of(name: str) -> Any:
    return import_module(f"tests.models.{name}_case")


def test_no_family_is_left_out() -> None:
    among = {name for name in BUILT_IN if isinstance(FAMILIES.named(name), Concatenated)}
    assert among == {*NAMES, "glm46v", "idefics3"}  # whose classes are tried beside GLM-4V, SmolVLM


# ---- every kind of batch

MODELS = (
    *((name, "tiny_model") for name in NAMES),
    ("gemma4", "larger_model"),
    ("gemma4", "moe_model"),
)
RANKS = ((1, 1), (2, 0), (3, 0), (3, 1), (3, 2), (3, 3))
"""How many, and which of `case.METHODS` the first batch has."""
OTHER_RANKS = {"qwen3_5_moe": ((3, 2), (2, 1)), "video_llama_3": (*RANKS, (4, 2))}
BY_DEFAULT = {
    "qwen2_5_vl": ((1, 1), (3, 3)),
    "qwen3_vl": ((1, 1), (2, 0)),
    "qwen3_5_moe": ((3, 2),),
}
"""What is not exhaustive, where that is not two ranks alone."""


def each_on_ranks() -> Iterator[Any]:
    """Families, tiny models and `RANKS`, with their marks."""
    for name, model in MODELS:
        for ranks, offset in OTHER_RANKS.get(name, RANKS):
            marks = [pytest.mark.slow] if ranks > 1 else []
            if (ranks, offset) not in BY_DEFAULT.get(name, ((2, 0),)):
                marks = [pytest.mark.exhaustive]
            yield pytest.param(name, model, ranks, offset, marks=marks)


@functools.cache
def expected(name: str, model: str) -> dict[str, Any]:
    """`case.references` of a family, made when a test first asks for them."""
    own = getattr(of(name), "for_one_process", dict)
    return case.references(of(name).BATCHES, getattr(of(name), model), own)


def unused(name: str) -> str:
    """What is in the names of parameters that no model of a family uses."""
    return getattr(of(name), "UNUSED", "nothing")


@pytest.mark.parametrize(("name", "model", "ranks", "offset"), [*each_on_ranks()])
def test_every_kind_of_batch_equals_one_process(
    name: str, model: str, ranks: int, offset: int
) -> None:
    given = name, getattr(of(name), model), of(name).BATCHES, expected(name, model)
    case.check_each(*given, ranks=ranks, offset=offset, unused=unused(name))


@pytest.mark.parametrize(("name", "model"), MODELS)
def test_reference_has_gradients_everywhere(name: str, model: str) -> None:
    """Else the comparisons compare zeros: of every expert, too."""
    batch = "mixed" if hasattr(of(name), "mixed") else "hard_batch"
    for key, grad in expected(name, model)[batch]["grads"].items():
        experts = grad if ".experts." in key else grad[None]
        there = all(each.any() for each in experts)
        assert there or unused(name) in key, f"{name}, {batch}: {key}"


# ---- frames that are on their ranks already; other families have tests of their own


def step_local(name: str) -> dict[str, Any]:
    """Each rank has the pixels of its own part of a video alone, and the mask of all."""
    batch, model = of(name).one_video(), of(name).tiny_model()
    t, h, w = batch["video_grid_thw"][0].tolist()
    kept = batch.get("video_compression_mask", torch.ones(t * h * w // 4, dtype=torch.bool))
    mine = list(owned(kept.view(t, -1).sum(dim=1).tolist(), model=model))
    held = batch["pixel_values_videos"].unflatten(0, (t, -1))[mine].flatten(0, 1)
    given = {**batch, "pixel_values_videos": held if mine else None}
    return plain_step(case.rules(name, "lvx", 2), given, frames="local", model=model)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl_moe", "glm4v", "video_llama_3"])
def test_frames_that_are_on_their_ranks_already(name: str) -> None:
    alone = reference_steps([[of(name).one_video()]], of(name).tiny_model())
    assert_same_training(run_ranks(step_local, 2, name), alone, sp_size=2)


# ---- the rest


@pytest.mark.parametrize(
    "name",
    ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "gemma3", "video_llama_3", "gemma4"],
)
def test_a_patched_model_is_its_own_self_and_can_be_given_back(name: str) -> None:
    patched = partial(patched_by, case.rules(name, "ring", 1))
    assert_given_back(of(name).tiny_model, of(name).left_padded(), patched)


@ALL
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
