"""The visual features that layers share: their gradient in one piece, on the device or the host."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from ds_lvx.config import LVXConfig
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.models import patch_model
from ds_lvx.sharding import shard_batch
from tests.models.mllama_case import (
    ds_config,
    end_engine,
    hard_batch,
    plain_step,
    start_engine,
    tiny_model,
)
from tests.ranks import run_ranks

RECOMPUTE = {"method": "lvx", "recompute_kv": True}


def config_of(cross: dict[str, Any], *, sp_size: int = 2, stage: int = 0) -> dict[str, Any]:
    return ds_config(stage=stage, sp_size=sp_size, cross=cross, self_attn="ulysses")


def fail(_: Tensor) -> Tensor:
    raise KeyError("in the middle of a backward")


def backward_after(happening: str, cross: dict[str, Any], device: str = "cpu") -> dict[str, Tensor]:
    """Gradients of a backward after something else went through the same graph."""
    model = tiny_model().to(device)
    groups = SequenceParallelGroups(torch.distributed.get_world_size())
    config = LVXConfig.from_ds_config(config_of(cross, sp_size=groups.sp_size))
    patch = patch_model(model, config, groups)
    loss = model(**shard_batch(hard_batch(0), model=model)).loss
    embeddings = model.model.language_model.embed_tokens.weight
    if happening == "gradients of the text":
        torch.autograd.grad(loss, [embeddings], retain_graph=True)
    elif happening == "gradients of the features":
        projector = model.model.multi_modal_projector.weight
        torch.autograd.grad(loss, [projector], retain_graph=True)
    elif happening == "a backward that failed":
        hook = embeddings.register_hook(fail)
        with pytest.raises(KeyError):
            loss.backward(retain_graph=True)
        hook.remove()
    elif happening == "a backward":
        loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    patch.unpatch()
    groups.close()
    return gradients


HAPPENINGS = (
    "nothing",
    "gradients of the text",
    "gradients of the features",
    "a backward that failed",
    "a backward",
)


def backward_after_each(cross: dict[str, Any]) -> list[dict[str, Tensor]]:
    return [backward_after(happening, cross) for happening in HAPPENINGS]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [pytest.param(None, marks=pytest.mark.exhaustive), 4])
def test_one_backward_does_not_add_to_the_next(chunk: int | None) -> None:
    cross = RECOMPUTE if chunk is None else {**RECOMPUTE, "kv_chunk_tokens": chunk}
    for plain, *others in run_ranks(backward_after_each, 2, cross):
        for happening, got in zip(HAPPENINGS[1:], others, strict=True):
            assert got.keys() == plain.keys(), happening
            for name, gradient in plain.items():
                torch.testing.assert_close(got[name], gradient, msg=f"{happening}: {name}")


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [None, 4])
def test_features_on_the_host_train_like_those_on_the_device(chunk: int | None) -> None:
    cross = RECOMPUTE if chunk is None else {**RECOMPUTE, "kv_chunk_tokens": chunk}
    kept, offloaded = (
        run_ranks(backward_after, 1, "nothing", {**cross, "features": where}, "cuda")[0]
        for where in ("keep", "offload")
    )
    for name, gradient in kept.items():
        torch.testing.assert_close(offloaded[name], gradient, atol=1e-6, rtol=1e-6, msg=name)


def mixed_rules() -> str:
    config = config_of({**RECOMPUTE, "features": "offload"})
    rules = config["ds_lvx"]["layers"]
    rules.insert(0, {"match": "*.layers.3.cross_attn", "method": "ring"})
    groups = SequenceParallelGroups(1)
    with pytest.raises(NotImplementedError) as caught:
        patch_model(tiny_model(), LVXConfig.from_ds_config(config), groups)
    groups.close()
    return str(caught.value)


def test_features_are_on_the_host_for_all_layers_or_for_none() -> None:
    (text,) = run_ranks(mixed_rules, 1)
    assert text.startswith('ds_lvx.layers: got features "keep" for ')
    assert 'model.language_model.layers.3.cross_attn, beside "offload"' in text


CONTIGUOUS = {
    "partition_activations": True,
    "contiguous_memory_optimization": True,
    "number_checkpoints": 4,
}


def forwards_without_backward() -> float:
    """Forwards that fail, or whose loss is dropped, and then a step: its gradients' error."""
    expected = plain_step(config_of(RECOMPUTE), hard_batch(0))["grads"]
    model = tiny_model()
    engine = start_engine({**config_of(RECOMPUTE), "activation_checkpointing": CONTIGUOUS}, model)
    shard = shard_batch(hard_batch(0), model=model)
    hook = model.lm_head.register_forward_pre_hook(lambda *_: fail(torch.zeros(1)))
    for _ in range(2):
        with pytest.raises(KeyError):
            engine(**shard)
    hook.remove()
    for _ in range(2):
        engine(**shard)
    losses = [engine(**shard).loss for _ in range(2)]  # two that wait for their backward
    engine.backward(losses[0])
    errors = [
        (safe_get_full_grad(p) - expected[name]).abs().max().item()
        for name, p in model.named_parameters()
    ]
    engine.backward(losses[1])
    end_engine(engine)
    return max(errors)


@pytest.mark.slow
def test_the_contiguous_buffer_finds_room_again() -> None:
    assert max(run_ranks(forwards_without_backward, 2)) <= 1e-6


def two_engines() -> dict[str, Any]:
    first = start_engine({**config_of(RECOMPUTE), "activation_checkpointing": CONTIGUOUS})
    same = start_engine({**config_of(RECOMPUTE), "activation_checkpointing": CONTIGUOUS})
    end_engine(same)
    still = deepspeed.checkpointing.CONTIGUOUS_CHECKPOINTING
    other = {**config_of(RECOMPUTE), "activation_checkpointing": {}}
    with pytest.raises(ValueError, match=r"while an engine with .*ds_lvx.shutdown on that engine"):
        start_engine(other)
    end_engine(first)
    end_engine(start_engine(other))
    return {"still": still, "after": deepspeed.checkpointing.mpu}


def test_two_engines_have_one_section() -> None:
    assert run_ranks(two_engines, 2) == [{"still": True, "after": None}] * 2


def hidden_states_by_config() -> str:
    model = tiny_model()
    model.config.text_config.output_hidden_states = True
    section = {"partition_activations": True}
    engine = start_engine({**config_of(RECOMPUTE), "activation_checkpointing": section}, model)
    with pytest.raises(ValueError, match="got output_hidden_states=True") as caught:
        engine(**shard_batch(hard_batch(0), model=model))
    end_engine(engine)
    return str(caught.value)


def test_states_that_deepspeed_empties_cannot_be_asked_for() -> None:
    assert all("empties the states" in text for text in run_ranks(hidden_states_by_config, 2))
