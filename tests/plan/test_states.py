"""Weights, gradients and optimizer states, against finetune's models and ZeRO's engines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor, nn

from ds_lvx.initialize import initialize
from ds_lvx.models import FAMILIES
from ds_lvx.models.precision import is_packed
from ds_lvx.plan.memory import footprint, gathered_bytes, gradients_bytes
from ds_lvx.plan.scenario import Scenario
from ds_lvx.sharding import shard_batch
from ds_lvx.training.model import Source, load_model
from ds_lvx.training.options import parse
from tests.models import mllama_case as case
from tests.ranks import run_ranks

NONE = ("--data", "none", "--deepspeed_config", "none", "--output_dir", "none")
LORA = ("--lora_r", "4")
PACKED = (*LORA, "--load_in_4bit")
LIVE, BUCKET, WORDS = 100_000, 4096, 1024


def made(name: str, words: tuple[str, ...], **settings: Any) -> tuple[nn.Module, Scenario]:
    """A tiny model as finetune makes it of some words, and the planner's scenario of the same."""
    options = parse(["--model", f"tiny:{name}", *NONE, *words])
    source = Source.of(options.model)
    model = load_model(options, {"bf16": {"enabled": True}}, source)
    names = ("lora_r", "load_in_4bit", "freeze_vision")
    return model, Scenario(
        source.family.dimensions(source.config.to_dict(), name, ""),
        text_tokens=16,
        frames=2,
        **{each: getattr(options, each) for each in names},
        **settings,
    )


def numbers(weights: Iterable[Tensor]) -> int:
    return sum(p.numel() * (2 if is_packed(p) else 1) for p in weights)


@pytest.mark.parametrize(
    "name",
    ["mllama", "idefics", "glm4v_moe", "qwen3_vl_moe", "openflamingo", "qwen3_5", "qwen3_5_moe"],
)
def test_what_trains_and_what_is_in_4_bits(name: str) -> None:
    model, scenario = made(name, PACKED)
    trained = numbers(p for p in model.parameters() if p.requires_grad)
    packed = numbers(p for p in model.parameters() if is_packed(p))
    assert packed == scenario.quantized_parameters > 0
    if name == "openflamingo":  # one projection makes q, k and v, or k and v: fewer matrices
        assert 0.8 * scenario.trained_parameters < trained < scenario.trained_parameters
    else:
        assert trained == scenario.trained_parameters
    whole = numbers(model.parameters())
    assert 1 <= whole / (scenario.model.parameters + scenario.lora_parameters) < 1.08
    # Each rank reads the whole before the ranks share it, however many they are.
    held = _weights(model)
    needed = footprint(scenario, gpus=64, ranks=1, way="lvx ring")
    assert 0.75 < needed.loading / held <= 1  # of so small a model norms are a part
    assert needed.peak >= needed.loading


def test_a_frozen_tower() -> None:
    model, scenario = made("mllama", ("--freeze_vision",))
    trained = numbers(p for p in model.parameters() if p.requires_grad)
    assert trained == pytest.approx(scenario.trained_parameters, rel=0.01)
    assert trained < numbers(model.parameters()) - scenario.model.tower.parameters


@pytest.mark.slow
def test_states_are_those_of_an_engine() -> None:
    jobs = [(1, LORA), (2, PACKED), (3, PACKED), (3, ("--freeze_vision",))]
    for job, found in zip(jobs, run_ranks(_states, 2, jobs)[0], strict=True):
        states, uncounted, scenario = found
        expected = footprint(scenario, gpus=2, ranks=2, way="lvx ring").states + uncounted
        assert states == pytest.approx(expected, rel=2e-3), job


def _states(jobs: list[tuple[int, tuple[str, ...]]]) -> list[tuple[float, float, Scenario]]:
    """Bytes that this rank holds, and those of weights that the planner does not count."""
    found = []
    for stage, words in jobs:
        model, scenario = made("mllama", words, zero_stage=stage)
        frozen = trained = 0
        for weight in model.parameters():
            frozen += 0 if weight.requires_grad else numbers([weight])
            trained += weight.requires_grad * weight.numel()
        engine = initialize(model=model, config=_config(stage))[0]
        held = _weights(engine.module) + _optimizer(engine.optimizer)
        if stage < 3:  # a backward makes gradients, of which stage 2 keeps half
            held += 2 * trained / stage
        case.end_engine(engine)
        shares, extra = 2 if stage == 3 else 1, trained - scenario.trained_parameters
        rest = trained + frozen - scenario.model.parameters - scenario.lora_parameters
        found.append((held, 2 * rest / shares + 14 * extra / 2, scenario))
    return found


def _weights(model: nn.Module) -> int:
    held = 0
    for weight in model.parameters():
        held += getattr(weight, "ds_tensor", weight).nbytes
        if is_packed(weight):
            held += weight.quant_state.absmax.nbytes + weight.quant_state.state2.absmax.nbytes
    return held


def _optimizer(optimizer: Any) -> int:
    inner = optimizer.optimizer
    groups = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")  # at 3, below
    tensors = next(getattr(optimizer, name) for name in groups if hasattr(optimizer, name))
    for each in tensors:  # the moments are made by a step
        each.grad = torch.zeros_like(each)
    inner.param_groups[0]["params"] = list(tensors)
    inner.step()
    moments = [t for state in inner.state.values() for t in state.values() if t.numel() > 1]
    gradients = getattr(optimizer, "grad_partitions_flat_buffer", torch.empty(0))
    return sum(each.nbytes for each in (*tensors, *moments, gradients))


def _config(stage: int) -> dict[str, Any]:
    cross = {"method": "lvx", "recompute_kv": True}
    config = case.ds_config(stage=stage, sp_size=2, cross=cross, self_attn="ulysses")
    config["optimizer"] = {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}}
    del config["zero_allow_untested_optimizer"]
    sizes = {"stage3_max_live_parameters": LIVE, "reduce_bucket_size": BUCKET}
    sizes["stage3_max_reuse_distance"] = LIVE
    config["zero_optimization"] |= sizes
    return config | {"bf16": {"enabled": True}}


@pytest.mark.slow
def test_what_is_whole_at_zero_3() -> None:
    """DeepSpeed gathers as far ahead as it may; the head's gradient waits in full, and in fp32."""
    model, live, gradients = run_ranks(_whole, 2)[0]
    scenario = Scenario(model, text_tokens=16, frames=2)
    expected = gathered_bytes(scenario, live=LIVE)
    assert live == pytest.approx(expected, rel=0.1)
    assert live <= expected
    assert gradients == pytest.approx(gradients_bytes(scenario, ranks=2, bucket=BUCKET), rel=0.1)
    # All of a model that is smaller, and nothing on one GPU.
    assert gathered_bytes(scenario) == scenario.weight_bytes == 2 * model.parameters
    wholes = [footprint(scenario, gpus=n, ranks=1, way="lvx ring").whole for n in (1, 2)]
    assert wholes == [0, scenario.weight_bytes + gradients_bytes(scenario, ranks=1)]


def _whole() -> tuple[Any, int, int]:
    """The most bytes of weights that are gathered, and of gradients and their copies."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "vocab_size": WORDS}
    model = case.tiny_model(num_hidden_layers=12, cross_attention_layers=[3, 8], **sizes)
    dimensions = FAMILIES.named("mllama").dimensions(model.config.to_dict(), "", "")
    engine = initialize(model=model, config=_config(3))[0]
    weights, seen = list(engine.module.parameters()), [0, 0]
    gather = PartitionedParameterCoordinator._PartitionedParameterCoordinator__all_gather_params_
    reduce = stage3.reduce_scatter_coalesced
    buffer = next(iter(engine.optimizer.ipg_buckets.values())).buffer

    def gathering(*args: Any, **kwargs: Any) -> None:
        gather(*args, **kwargs)
        whole = [p for p in weights if p.ds_status != ZeroParamStatus.NOT_AVAILABLE]
        seen[0] = max(seen[0], sum(2 * p.ds_numel for p in whole if not p.ds_persist))

    def reducing(tensors: list[Tensor], group: Any = None) -> Any:
        grads = [p.grad for p in weights if p.grad is not None]
        storages = {t.untyped_storage().data_ptr(): t for t in (buffer, *grads, *tensors)}
        seen[1] = max(seen[1], sum(t.untyped_storage().nbytes() for t in storages.values()))
        return reduce(tensors, group)

    name = "_PartitionedParameterCoordinator__all_gather_params_"
    with (
        mock.patch.object(PartitionedParameterCoordinator, name, gathering),
        mock.patch.object(stage3, "reduce_scatter_coalesced", reducing),
    ):
        for step in range(3):  # it looks ahead when it has seen a whole step
            out = engine(**shard_batch(case.hard_batch(step), model=engine.module))
            engine.backward(out.loss)
            engine.step()
    case.end_engine(engine)
    return dimensions, *seen
