"""Layers that carry a state: what a rank sends and keeps, against a patched Qwen3.5."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from ds_lvx import traffic
from ds_lvx.attention.replay import Box
from ds_lvx.config import LVXConfig
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.models import FAMILIES, patch_model
from ds_lvx.models.dimensions import Model, RecurrentLayers
from ds_lvx.plan.cards import card
from ds_lvx.plan.cluster import from_card
from ds_lvx.plan.models import model as known
from ds_lvx.plan.recurrent import checkpointed_bytes, kept_bytes, rule_operations
from ds_lvx.plan.scenario import Scenario
from ds_lvx.plan.step import step
from ds_lvx.sharding import shard_batch
from tests.models.concatenated_case import rules
from tests.models.qwen3_5_case import tiny_model
from tests.plan.counting import SavedBytes
from tests.ranks import run_ranks

NAME = "qwen3_5"
TOKENS = 64  # of a rank


def run_step(
    ranks: int, layers: int, tokens: int, dtype: torch.dtype, checkpoint: bool
) -> tuple[int, list[int], int]:
    """Bytes that a rank sends, that each layer with a state saves, and that checkpoints keep of
    what such layers sent."""
    model = tiny_model(num_hidden_layers=layers).to(dtype)
    config, groups = rules(NAME, "ring", ranks), SequenceParallelGroups(ranks)
    if layers == 0:
        config["ds_lvx"]["layers"].pop()
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    patch = patch_model(model, LVXConfig.from_ds_config(config), groups)
    ids = torch.arange(tokens * ranks)[None] % 50 + 3
    shard = shard_batch({"input_ids": ids, "labels": ids}, model=model)
    kept: list[int] = []

    def put(box: Box, operation: str, result: Any) -> None:
        putting(box, operation, result)
        kept.append(result.nbytes if operation.startswith("run_by_heads") else 0)

    putting, saved = Box.put, SavedBytes(model, "linear_attn")
    with traffic() as sent, mock.patch.object(Box, "put", put):
        model(**shard).loss.backward()
    patch.unpatch()
    groups.close()
    return sent.bytes_sent, saved.of_layers, sum(kept)


def run_each(*jobs: Any) -> list[Any]:
    ranks = torch.distributed.get_world_size()
    return [run_step(ranks, *job) for job in jobs]


def dimensions() -> Model:
    return FAMILIES.named(NAME).dimensions(tiny_model().config.to_dict(), "tiny", "its config")


def test_operations_are_those_of_transformers() -> None:
    """torch counts all but the triangular solutions."""
    layers = RecurrentLayers(1, hidden=8, heads=3, kv_heads=3, head_dim=24, key_dim=16)
    q, k = (torch.randn(1, 2 * TOKENS, 3, 16) for _ in range(2))
    v, beta = torch.randn(1, 2 * TOKENS, 3, 24), torch.rand(1, 2 * TOKENS, 3)
    with FlopCounterMode(display=False) as counted:
        torch_chunk_gated_delta_rule(q, k, v, g=-beta, beta=beta)
    solutions = 2 * 64 * (16 + 24)
    expected = 2 * TOKENS * 3 * (rule_operations(layers) - solutions)
    assert counted.get_total_flops() == expected


def test_a_checkpointed_layer_computes_twice_and_sends_once() -> None:
    model, cluster = known("Qwen3.5-9B"), from_card(card("H100"), gpus=4)
    once, twice = (
        step(Scenario(model, 4096, 32, checkpointing=each), cluster, ranks=4, way="ring")
        for each in (False, True)
    )
    assert once.bytes_sent == twice.bytes_sent
    part, tokens, device = "layers with a state", 4096 + 32 * 98, cluster.device
    assert once.parts[f"{part}, network"] == twice.parts[f"{part}, network"] > 0
    # A quarter of the tokens through all weights, all tokens through a quarter of 32 heads.
    weights = 4096 * (8192 + 2 * 4096 + 2 * 32) + 8192 * 4 + 2 * 32 + 128 + 3 * 4096 * 12_288
    products = 2 * (64 * 5 * 128 + 3 * 128**2)
    kept = 4 * (11 * 128 + 5 * 64 + 128**2 / 64 + 8.5 + 1 / 64)
    computing = tokens / 4 * (2 * weights + 32 * products) / device.matmul_flops
    writing = tokens / 4 * 32 * kept / device.stream_bytes_per_s
    again = twice.parts[part] - once.parts[part]
    assert again == pytest.approx(24 * (computing + writing))


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param(3, marks=pytest.mark.slow),
        *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (2, 4)),
    ],
)
def test_a_step_sends_and_keeps_what_the_planner_says(ranks: int) -> None:
    """With three ranks heads of keys are repeated, with four some ranks run a group again."""
    layers = dimensions().recurrent
    assert layers is not None
    whole, half = torch.float32, torch.bfloat16
    jobs = [(3, TOKENS, whole, False), (0, TOKENS, whole, False), (3, TOKENS, half, True)]
    jobs += [(3, n * TOKENS, half, False) for n in (1, 2)]
    model = replace(dimensions(), frame_tokens=1)
    scenario = Scenario(model, text_tokens=ranks * TOKENS - 1, frames=1, element_bytes=4)
    found = step(scenario, from_card(card("H100"), gpus=ranks), ranks=ranks, way="ring")
    expected = kept_bytes(layers, ranks=ranks, element_bytes=2)
    input_bytes = 2 * layers.hidden
    arrived = checkpointed_bytes(layers, ranks=ranks, element_bytes=2) - input_bytes
    for three, none, checkpointed, few, many in run_ranks(run_each, ranks, *jobs):
        assert three[0] - none[0] == found.bytes_sent
        assert checkpointed[2] == 2 * TOKENS * arrived
        for least, most in zip(few[1], many[1], strict=True):
            assert (most - least) / TOKENS == pytest.approx(expected, rel=3e-3)
