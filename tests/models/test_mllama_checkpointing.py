"""Checkpointed layers of mllama, by the ds_config or by transformers: attention runs once."""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import deepspeed
import pytest
import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ds_lvx.models.checkpointed_layers import EncoderForward, LayerCheckpointing
from ds_lvx.sharding import shard_batch
from tests.counts import Counts, boxes
from tests.models.mllama_case import (
    assert_same_training,
    ds_config,
    end_engine,
    hard_batch,
    lora_model,
    reference_steps,
    sharded_steps,
    start_engine,
    tiny_model,
)
from tests.ranks import run_ranks

RECOMPUTE = {"method": "lvx", "recompute_kv": True}
CROSS: dict[str, tuple[dict[str, Any], str]] = {
    # the rule of the cross-attention layers, the method of the text layers
    "lvx": ({"method": "lvx", "schedule": "ring"}, "ring"),
    "recompute": (RECOMPUTE, "ulysses"),
    "chunks": ({**RECOMPUTE, "kv_chunk_tokens": 4}, "lvx"),
    "offload": ({**RECOMPUTE, "features": "offload", "kv_chunk_tokens": 7}, "ulysses"),
    "ring": ({"method": "ring"}, "ring"),
    "ulysses": ({"method": "ulysses"}, "ulysses"),
}
BATCHES = [[hard_batch(0)], [hard_batch(1)]]


def config_of(name: str, stage: int, section: dict[str, Any] | None = None) -> dict[str, Any]:
    cross, self_attn = CROSS[name]
    config = ds_config(stage=stage, sp_size=2, cross=cross, self_attn=self_attn)
    return config if section is None else {**config, "activation_checkpointing": section}


def enabled(reentrant: bool, make: Callable[[], Any] = tiny_model) -> Any:
    """A model that transformers checkpoints."""
    model = make()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def train(config: dict[str, Any], make: Callable[[], Any] = tiny_model) -> dict[str, Any]:
    """Two steps, and what the rank did for them."""
    torch.manual_seed(5)
    with Counts() as counts:
        result = sharded_steps(config, BATCHES, model=make())
    return {**result, "counts": counts.figures(), "boxes": boxes()}


def train_all(jobs: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [train(*job) for job in jobs]


@functools.cache
def plain(stage: int, name: str, make: Callable[[], Any]) -> list[dict[str, Any]]:
    """By rank, without checkpoints; it trains as one process does."""
    results = run_ranks(train, 2, config_of(name, stage), make)
    assert_same_training(results, in_one_process(make), sp_size=2)
    return results


@functools.cache
def in_one_process(make: Callable[[], Any]) -> Any:
    return reference_steps(BATCHES, make())


def check(
    stage: int,
    name: str,
    jobs: list[tuple[Any, ...]],
    make: Callable[[], Any] = tiny_model,
) -> None:
    """They train as without checkpoints, and attend and send as often."""
    results = run_ranks(train_all, 2, jobs)
    for index, job in enumerate(jobs):
        each = [result[index] for result in results]
        assert_same_training(each, in_one_process(make), sp_size=2)
        for got, bare in zip(each, plain(stage, name, make), strict=True):
            assert got["counts"] == bare["counts"], job
            assert got["boxes"] == bare["boxes"] == 0, job
            for parameter, gradient in bare["grads"].items():
                torch.testing.assert_close(got["grads"][parameter], gradient, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        pytest.param(2, "chunks", marks=pytest.mark.exhaustive),
        pytest.param(3, "recompute", marks=pytest.mark.slow),
        pytest.param(0, "lvx", marks=pytest.mark.exhaustive),
        pytest.param(1, "ring", marks=pytest.mark.exhaustive),
        pytest.param(2, "ulysses", marks=pytest.mark.exhaustive),
        pytest.param(3, "offload", marks=pytest.mark.exhaustive),
    ],
)
def test_the_config_alone_checkpoints_the_layers(stage: int, name: str) -> None:
    check(stage, name, [(config_of(name, stage, {}),)])


@pytest.mark.parametrize(
    "stage",
    [pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.exhaustive)],
)
def test_transformers_checkpoints_before_initialize(stage: int) -> None:
    config = config_of("recompute", stage)
    jobs = [(config, partial(enabled, reentrant)) for reentrant in (False, True)]
    check(stage, "recompute", jobs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "name"),
    [(2, "chunks"), pytest.param(3, "recompute", marks=pytest.mark.exhaustive)],
)
def test_lora_under_checkpoints(stage: int, name: str) -> None:
    config = config_of(name, stage)
    checkpointed = {
        2: (config_of(name, stage, {}), lora_model),
        3: (config, partial(enabled, False, lora_model)),
    }
    check(stage, name, [checkpointed[stage]], lora_model)


def lora_with_dropout(section: dict[str, Any] | None) -> dict[str, Any]:
    return train(config_of("recompute", 1, section), partial(lora_model, 0.3))


@pytest.mark.slow
def test_dropout_in_the_projection_falls_alike_in_all_runs() -> None:
    """K and V are projected twice, the rest of a layer three times: the same numbers each time."""
    for section in (None, {}):
        results = run_ranks(lora_with_dropout, 2, section)
        if section is None:
            expected = results
    for got, plain in zip(results, expected, strict=True):
        for name, gradient in plain["grads"].items():
            torch.testing.assert_close(got["grads"][name], gradient, atol=1e-6, rtol=1e-6)


SECTIONS: list[dict[str, Any]] = [
    {"partition_activations": True},
    {
        "partition_activations": True,
        "contiguous_memory_optimization": True,
        "number_checkpoints": 4,
    },
    {"synchronize_checkpoint_boundary": True, "number_checkpoints": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "name", "sections"),
    [
        (1, "recompute", SECTIONS[1:]),
        *(pytest.param(1, "ulysses", [s], marks=pytest.mark.exhaustive) for s in SECTIONS),
        pytest.param(3, "recompute", SECTIONS[1:2], marks=pytest.mark.exhaustive),
    ],
)
def test_deepspeeds_own_settings(stage: int, name: str, sections: list[dict[str, Any]]) -> None:
    check(stage, name, [(config_of(name, stage, s),) for s in sections])


def kept_by_a_forward(section: dict[str, Any] | None) -> dict[str, Any]:
    """The features that live after a forward, and how often a layer projects K in a step."""
    model = tiny_model()
    engine = start_engine(config_of("recompute", 1, section), model)
    projections, shapes = [], []
    k_proj = model.model.language_model.layers[1].cross_attn.k_proj

    def project(module: Any, args: Any, k: torch.Tensor) -> None:
        projections.append(torch.is_grad_enabled())
        shapes.append(args[0].shape)

    k_proj.register_forward_hook(project)
    out = engine(**shard_batch(hard_batch(0), model=model))
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    features = {x.data_ptr() for x in tensors if x.shape == shapes[0]}
    engine.backward(out.loss)
    end_engine(engine)
    return {"features": len(features), "projections": projections}


@pytest.mark.parametrize(
    "section",
    [{}, SECTIONS[1], *(pytest.param(s, marks=pytest.mark.exhaustive) for s in SECTIONS[::2])],
)
def test_features_are_kept_once_and_projected_twice(section: dict[str, Any]) -> None:
    """K and V once in forward and once in backward, never for the second run of the layer."""
    expected = {"features": 1, "projections": [False, True]}
    assert run_ranks(kept_by_a_forward, 2, section) == [expected] * 2


def vision_runs(section: dict[str, Any] | None) -> dict[str, Any]:
    """How often a layer of the vision tower runs in a step, and what autograd keeps of it."""
    model = tiny_model()
    engine = start_engine(config_of("recompute", 2, section), model)
    runs = []
    layer = model.model.vision_model.transformer.layers[1]
    layer.mlp.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    engine.backward(engine(**shard_batch(hard_batch(0), model=model)).loss)
    end_engine(engine)
    return {"runs": runs, "trains": all(p.grad is not None for p in layer.parameters())}


def test_the_vision_tower_is_checkpointed_too() -> None:
    """transformers has the switch on mllama's encoders, but does nothing with it."""
    for answer in run_ranks(vision_runs, 2, None):
        assert answer["runs"] == [True]
    for answer in run_ranks(vision_runs, 2, {}):
        assert answer["runs"] == [False, True]


def lives(section: dict[str, Any]) -> dict[str, Any]:
    """Forwards and backwards in another order, an evaluation between, and all of it undone."""
    model = enabled(False)
    engine = start_engine(config_of("recompute", 1, section), model)
    shards = [shard_batch(hard_batch(seed), model=model) for seed in (0, 1)]
    losses = [engine(**shard).loss for shard in shards]
    engine.eval()
    with torch.no_grad():
        engine(**shards[0])
    engine.train()
    configured = deepspeed.checkpointing.PARTITION_ACTIVATIONS
    for loss in losses:
        engine.backward(loss)
    del losses, loss
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Module)]
    wrapped = sum(map(is_wrapped, layers))
    end_engine(engine)
    return {
        "wrapped": wrapped,
        "left": sum(map(is_wrapped, layers)),
        "configured": configured,
        "still": deepspeed.checkpointing.PARTITION_ACTIVATIONS,
        "mpu": deepspeed.checkpointing.mpu,
        "boxes": boxes(),
    }


def is_wrapped(module: Any) -> bool:
    """Whether a layer's checkpoint function, or its forward, is ours."""
    function = module.__dict__.get("_gradient_checkpointing_func")
    forward = module.__dict__.get("forward")
    return isinstance(function, LayerCheckpointing) or isinstance(forward, EncoderForward)


def test_everything_is_undone_at_the_end() -> None:
    for answer in run_ranks(lives, 2, {"partition_activations": True}):
        assert answer["wrapped"] == 4 + 3  # text layers, vision layers
        assert answer["left"] == 0
        assert answer["configured"]
        assert not answer["still"]
        assert answer["mpu"] is None
        assert answer["boxes"] == 0


def enable_afterwards(stage: int) -> dict[str, Any]:
    """transformers switches checkpoints on, and off again, while the engine is there."""
    model = tiny_model()
    engine = start_engine(config_of("recompute", stage), model)
    shard = shard_batch(hard_batch(0), model=model)
    counts = []
    for switch in (None, model.gradient_checkpointing_enable, model.gradient_checkpointing_disable):
        if switch is not None:
            switch()
        with Counts() as counted:
            engine.backward(engine(**shard).loss)
        counts.append(counted.figures())
        engine.step()
    end_engine(engine)
    return {"counts": counts}


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_transformers_checkpoints_after_initialize(stage: int) -> None:
    for answer in run_ranks(enable_afterwards, 2, stage):
        assert answer["counts"][0] == answer["counts"][1] == answer["counts"][2]


def refused(function: Any, stage: int, section: dict[str, Any] | None, forward: bool) -> str:
    """The error of an engine over a model with this checkpoint function."""
    model = tiny_model()
    if function is not None:
        model._set_gradient_checkpointing(True, function)
    engine = None
    try:
        engine = start_engine(config_of("recompute", stage, section), model)
        keywords = {"output_hidden_states": True} if forward else {}
        engine.backward(engine(**shard_batch(hard_batch(0), model=model), **keywords).loss)
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if engine is not None:
            end_engine(engine)
    return "nothing"


def alien(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


NON_REENTRANT = deepspeed.checkpointing.non_reentrant_checkpoint
REFUSALS: list[tuple[Any, int, dict[str, Any] | None, bool, str]] = [
    (alien, 1, None, False, r"ValueError: .*got tests.*alien; expected deepspeed.checkpointing"),
    (NON_REENTRANT, 3, None, False, r"NotImplementedError: .*non_reentrant_checkpoint: got a lay"),
    (NON_REENTRANT, 2, None, False, r"nothing"),
    (partial(torch_checkpoint, use_reentrant=False), 3, None, False, r"nothing"),
    (None, 1, {"cpu_checkpointing": True}, False, r"NotImplementedError: .*CPU accelerator"),
    (None, 1, {"partitioned": 1}, False, r'unknown key \(did you mean "partition_activations"\?\)'),
    (None, 1, {"number_checkpoints": 0}, False, r"number_checkpoints: got 0; .*greater than"),
    (None, 1, [], False, r"activation_checkpointing: got \[\], expected an object"),
    (None, 1, {"contiguous_memory_optimization": True}, False, r"without partition_activations"),
    (
        None,
        1,
        {**SECTIONS[1], "number_checkpoints": 3},
        False,
        r"number_checkpoints: got 3 for 4 text layers; expected at least 4",
    ),
    (None, 1, {"partition_activations": True}, True, r"ValueError: got output_hidden_states=True"),
]


def refused_each(cases: list[tuple[Any, int, Any, bool]]) -> list[str]:
    return [refused(*case) for case in cases]


@pytest.mark.slow
def test_what_cannot_be_is_an_error_on_every_rank() -> None:
    for answers in run_ranks(refused_each, 2, [case[:-1] for case in REFUSALS]):
        for (*case, words), answer in zip(REFUSALS, answers, strict=True):
            assert re.search(words, answer), (case, answer)
