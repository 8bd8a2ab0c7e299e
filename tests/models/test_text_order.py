"""`text_order`: who holds which tokens of a text, and that nothing else depends on it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_lvx import gather_sequence
from ds_lvx.attention.zigzag import dealt
from ds_lvx.config import LVXConfig
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.models import patch_model
from ds_lvx.sharding import shard_batch
from tests.models import idefics_case
from tests.models.mllama_case import (
    assert_same_training,
    ds_config,
    hard_batch,
    plain_step,
    reference_steps,
    tiny_model,
    trained,
)
from tests.ranks import run_ranks

RECOMPUTE: dict[str, Any] = {"method": "lvx", "recompute_kv": True}
LVX: dict[str, Any] = {"method": "lvx"}


def config(self_attn: Any, order: str, *, ranks: int, stage: int = 0) -> dict[str, Any]:
    made = ds_config(stage=stage, sp_size=ranks, cross=RECOMPUTE, self_attn=self_attn)
    made["ds_lvx"]["text_order"] = order
    return made


def orders(each: list[dict[str, Any]]) -> list[tuple[Tensor | None, Tensor]]:
    """Of each config: the order that a shard notes, and the places of this rank's tokens."""
    found = []
    for one in each:
        model, section = tiny_model(), LVXConfig.from_ds_config(one)
        groups = SequenceParallelGroups(section.sequence_parallel_size)
        patch_model(model, section, groups)
        shard = shard_batch(hard_batch(), model=model)
        found.append((shard["ds_lvx"].order, shard["position_ids"][0]))
        groups.close()
    return found


def test_auto_is_zigzag_where_ring_or_lvx_run_in_the_text() -> None:
    zigzag = [("ring", "auto"), (LVX, "auto"), ("ulysses", "zigzag")]
    runs = [("ulysses", "auto"), ("auto", "auto"), ("ring", "contiguous")]
    each = [config(rule, order, ranks=2) for rule, order in zigzag + runs]
    for rank, found in enumerate(run_ranks(orders, 2, each)):
        for order, places in found[:3]:
            assert order is not None
            assert torch.equal(places, dealt(17, 2)[rank])
        for order, places in found[3:]:
            assert order is None
            assert torch.equal(places, torch.arange(17).split(9)[rank])


def steps(each: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [plain_step(one, hard_batch()) for one in each]


@functools.cache
def reference() -> dict[str, Any]:
    found = reference_steps([[hard_batch()]])
    return {key: found[key] for key in ("losses", "logits", "grads")}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_zigzag_is_one_process_by_every_method(ranks: int) -> None:
    """mllama: text before the first image, padding, two samples, an uneven number of tokens."""
    rules: list[Any] = ["ring", LVX, RECOMPUTE, "ulysses", {"method": "hybrid", "ulysses": 1}]
    each = [config(rule, "zigzag", ranks=ranks) for rule in rules]
    results = run_ranks(steps, ranks, each)
    for index in range(len(rules)):
        assert_same_training([r[index] for r in results], reference(), sp_size=ranks)


def idefics_steps(each: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for one in each:
        model = idefics_case.tiny_model()
        result = plain_step(one, idefics_case.hard_batch(), model=model)
        names = {name for name, _ in trained(model)}
        result["grads"] = {n: grad for n, grad in result["grads"].items() if n in names}
        found.append(result)
    return found


@pytest.mark.exhaustive
@pytest.mark.parametrize("ranks", [2, 3])
def test_so_is_idefics(ranks: int) -> None:
    each = []
    for rule in ("ring", "ulysses", "lvx"):
        made = idefics_case.ds_config(stage=0, sp_size=ranks, cross=RECOMPUTE, self_attn=rule)
        made["ds_lvx"]["text_order"] = "zigzag"
        each.append(made)
    expected = reference_steps([[idefics_case.hard_batch()]], idefics_case.tiny_model())
    del expected["weights"]
    results = run_ranks(idefics_steps, ranks, each)
    for index in range(len(each)):
        assert_same_training([r[index] for r in results], expected, sp_size=ranks)


def packed() -> dict[str, Tensor]:
    """Documents of 5, 9 and 3 tokens in a row, without images or mask."""
    ids = hard_batch()["input_ids"][:1] % 100 + 1
    positions = torch.cat([torch.arange(n) for n in (5, 9, 3)])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids.clone()}


def gathered_without_a_shard() -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    model, section = tiny_model(), LVXConfig.from_ds_config(config("ring", "zigzag", ranks=2))
    groups = SequenceParallelGroups(2)
    patch_model(model, section, groups)
    mine = shard_batch(packed(), model=model)["position_ids"]
    with pytest.raises(ValueError, match="not side by side") as raised:
        gather_sequence(mine)
    whole, other = gather_sequence(mine, shard={}), gather_sequence(mine[:, 1:])
    groups.close()
    return str(raised.value), tuple(whole.shape), tuple(other.shape)


def test_logits_are_not_gathered_out_of_order() -> None:
    for message, whole, other in run_ranks(gathered_without_a_shard, 2):
        assert "shard=" in message
        assert (whole, other) == ((1, 17), (1, 15))


def packed_logits(one: dict[str, Any]) -> Tensor:
    model, section = tiny_model(), LVXConfig.from_ds_config(one)
    groups = SequenceParallelGroups(section.sequence_parallel_size)
    patch_model(model, section, groups)
    shard = shard_batch(packed(), model=model)
    whole = gather_sequence(model(**shard).logits, shard=shard).detach()
    groups.close()
    return whole


def test_packed_documents_stay_apart_and_logits_come_in_order() -> None:
    model, batch = tiny_model(), packed()
    expected = [
        model(input_ids=part, use_cache=False).logits
        for part in batch["input_ids"].split((5, 9, 3), dim=1)
    ]
    for whole in run_ranks(packed_logits, 2, config("ring", "auto", ranks=2)):
        torch.testing.assert_close(whole, torch.cat(expected, dim=1), atol=1e-5, rtol=1e-5)
