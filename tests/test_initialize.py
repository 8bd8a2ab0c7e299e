"""`initialize`: deepspeed.initialize's call, the table, mistakes on all ranks, precision."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import types
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import nn

from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.distributed.shutdown import shutdown
from ds_lvx.initialize import apply, initialize
from ds_lvx.models.patch import Hook, is_patched
from ds_lvx.sharding import mean_loss, shard_batch
from tests.models.mllama_case import (
    LEARNING_RATE,
    ds_config,
    end_engine,
    hard_batch,
    reference_steps,
    start_engine,
    tiny_model,
    trained,
    weights,
)
from tests.ranks import RankError, run_ranks

RECOMPUTE = {"method": "lvx", "recompute_kv": True}


def config_of(*, stage: int = 1, sp_size: int = 2, **sections: Any) -> dict[str, Any]:
    config = ds_config(stage=stage, sp_size=sp_size, cross=RECOMPUTE, self_attn="ulysses")
    return {**config, **sections}


def test_signature_is_that_of_deepspeed() -> None:
    ours = inspect.signature(initialize).parameters
    theirs = inspect.signature(deepspeed.initialize).parameters
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name
        assert ours[name].kind == parameter.kind, name


def start_and_describe(config: Any) -> dict[str, Any]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        engine = start_engine(config)
    session = engine.ds_lvx
    described = {
        "printed": printed.getvalue(),
        "patched": is_patched(engine.module),
        "sizes": (session.groups.dp_size, session.groups.sp_size),
        "current": SequenceParallelGroups.current() is session.groups,
        "batch": engine.train_batch_size(),
    }
    module = engine.module
    described["hooks"] = len(hooks_of_ours(module))
    shutdown(engine)
    left = is_patched(module) or hooks_of_ours(module) or SequenceParallelGroups.current()
    return {**described, "left": bool(left)}


def hooks_of_ours(model: nn.Module) -> list[Hook]:
    hooks = [(*m._forward_hooks.values(), *m._forward_pre_hooks.values()) for m in model.modules()]
    return [hook for some in hooks for hook in some if isinstance(hook, Hook)]


@pytest.mark.slow
def test_rank_0_prints_one_table_and_shutdown_ends_everything() -> None:
    results = run_ranks(start_and_describe, 4, config_of(stage=3))
    for rank, result in enumerate(results):
        assert ("recompute_kv" in result["printed"]) == (rank == 0)
        assert result["patched"]
        assert result["current"]
        # The text's masks, four for the features, the checkpoints, the loss's scale at stage 3.
        assert result["hooks"] == 7
        assert not result["left"]
        assert result["sizes"] == (2, 2)
        assert result["batch"] == 2  # two replicas, not four ranks
    lines = results[0]["printed"].splitlines()
    (row,) = [line.split() for line in lines if "cross_attn  " in line]
    assert row == ["model.language_model.layers.{1,3}.cross_attn", "lvx", "auto", "auto", "yes"]


def ways_to_say_it(folder: str) -> list[int]:
    """The config as a path, in args, and as config_params; an optimizer from the config."""
    config = config_of(optimizer={"type": "SGD", "params": {"lr": LEARNING_RATE}})
    rank = torch.distributed.get_rank()
    path = str(Path(folder, f"config{rank}.json"))
    Path(path).write_text(json.dumps(config))
    stages = []
    for given in (
        {"config": path},
        {
            "args": types.SimpleNamespace(
                deepspeed_config=path, local_rank=int(os.environ["LOCAL_RANK"])
            )
        },
        {"config_params": config},
    ):
        model = tiny_model()
        returned = initialize(model=model, model_parameters=model.parameters(), **given)
        assert len(returned) == 4
        assert returned[1] is returned[0].optimizer
        stages.append(returned[0].zero_optimization_stage())
        end_engine(returned[0])
    return stages


def test_the_config_comes_from_where_deepspeed_takes_it(tmp_path: Path) -> None:
    assert run_ranks(ways_to_say_it, 2, str(tmp_path)) == [[1, 1, 1]] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "got no ds_config"),
        (
            {"config": {}, "args": types.SimpleNamespace(deepspeed_config="x.json")},
            "expected one of them",
        ),
        ({"config": {}, "mpu": object()}, "neither mpu nor mesh_param"),
        ({"config": {}, "model": None}, "got model of type NoneType"),
        ({"config": {"ds_lvx": {"layer": []}}}, '"layers"'),
        ({"config": "no/such/file.json"}, "no such file"),
    ],
)
def test_mistakes_that_need_no_ranks(
    arguments: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=words):
        initialize(**{"model": nn.Linear(1, 1), **arguments})


# ---- mistakes on ranks


def make_mistakes(whats: list[str]) -> list[tuple[str, bool]]:
    """Make one mistake after the other, then start an engine as if nothing had been."""
    found = [make_mistake(what) for what in whats]
    engine = start_engine(config_of())
    assert torch.isfinite(engine(**shard_batch(hard_batch(), model=engine.module)).loss)
    end_engine(engine)
    return found


SECTIONS: dict[str, dict[str, Any]] = {
    "mesh": {"data_parallel_size": 1},
    "deepspeed": {"train_batch_size": 7, "gradient_accumulation_steps": 2},
    "no section": {"bf16": True},
}


def make_mistake(what: str) -> tuple[str, bool]:
    """The error's text, and whether model and process are as they were."""
    rank = torch.distributed.get_rank()
    config, model = config_of(**SECTIONS.get(what, {})), tiny_model()
    if what == "typo on one rank" and rank == 1:
        config["ds_lvx"]["layers"][1]["metod"] = "lvx"
    elif what == "other method on one rank" and rank == 0:
        config["ds_lvx"]["layers"][2]["method"] = "ring"
    elif what == "other stage on one rank" and rank == 0:
        config["zero_optimization"]["stage"] = 3
    elif what == "other model on one rank" and rank == 1:
        model = tiny_model(num_hidden_layers=6)
    elif what == "no family":
        model = nn.Linear(2, 2)
    elif what == "size":
        config["ds_lvx"]["sequence_parallel_size"] = 3
    elif what == "no rule":
        del config["ds_lvx"]["layers"][2]
    elif what == "heads":
        model = tiny_model(num_attention_heads=1, num_key_value_heads=1)
    try:
        start_wrongly(what, config, model)
    except (ValueError, NotImplementedError, AssertionError) as error:
        text = f"{type(error).__name__}: {error}"
    else:
        text = "no error"
    return text, not is_patched(model) and SequenceParallelGroups.current() is None


def start_wrongly(what: str, config: dict[str, Any], model: Any) -> None:
    """Start with what is wrong beside config and model on rank 1, if that is the mistake."""
    here = torch.distributed.get_rank() == 1
    if what.startswith("no config"):
        initialize(model=model, config=None if here else config)
    elif what.startswith("apply"):
        other_size = "size" in what
        with contextlib.closing(SequenceParallelGroups(1 if other_size else 2)) as groups:
            given = None if here and not other_size else model
            apply(given, config, groups=groups if here or not other_size else None)
    else:
        start_engine(config, model)


MISTAKES = {
    "typo on one rank": ["ValueError: rank 1: ", "metod", '"method"'],
    "other method on one rank": [
        "the ranks disagree on ds_lvx.layers[2].method: got ring on rank 0"
    ],
    "other stage on one rank": [
        "disagree on zero_optimization.stage: got 3 on rank 0, 1 on rank 1"
    ],
    "other model on one rank": ["ValueError", "the ranks disagree on layers"],
    "no config on one rank": ["ValueError: rank 1: got no ds_config"],
    "apply to no model on one rank": ["ValueError: rank 1: got model of type NoneType"],
    "apply by groups of another size on one rank": ["ValueError: rank 1: got groups of 1 rank"],
    "no family": ["NotImplementedError", "Linear", "mllama"],
    "size": ["ValueError", "ds_lvx.sequence_parallel_size: got 3", "1, 2"],
    "mesh": ["ValueError", "data_parallel_size"],
    "no section": ["ValueError: all ranks: bf16: got true; expected an object"],
    "no rule": ["ValueError", "self_attn", '"*language_model*.self_attn"'],
    "heads": ["ValueError", "got ulysses on 2 ranks"],
    "deepspeed": ["AssertionError", "train_batch_size"],
}


@pytest.mark.slow
def test_mistakes_raise_on_all_ranks_and_leave_nothing() -> None:
    for found in run_ranks(make_mistakes, 2, list(MISTAKES)):
        for (what, words), (text, clean) in zip(MISTAKES.items(), found, strict=True):
            assert all(word in text for word in words), f"{what}: {text}"
            assert clean, what


# ---- precision, accumulation, evaluation


def gradient_scale(stage: int, sections: dict[str, Any]) -> float:
    """The norm of all gradients of a step."""
    engine = start_engine(config_of(stage=stage, **sections))
    out = engine(**shard_batch(hard_batch(), model=engine.module))
    engine.backward(out.loss)
    grads = [safe_get_full_grad(p).double().norm() for _, p in trained(engine.module)]
    end_engine(engine)
    return float(torch.stack(grads).norm())


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(0, marks=pytest.mark.exhaustive),
        pytest.param(1, marks=pytest.mark.exhaustive),
        2,
        pytest.param(3, marks=pytest.mark.exhaustive),
    ],
)
def test_bf16_has_the_gradients_of_one_process(stage: int) -> None:
    """Exact parity is fp32's; a factor of the group's size would show at any precision."""
    grads = reference_steps([[hard_batch()]])["grads"].values()
    expected = float(torch.stack([grad.double().norm() for grad in grads]).norm())
    sections = {"bf16": {"enabled": True}}
    for norm in run_ranks(gradient_scale, 2, stage, sections):
        assert norm == pytest.approx(expected, rel=0.1)


def accumulated_weights(stage: int) -> dict[str, Any]:
    engine = start_engine(config_of(stage=stage, gradient_accumulation_steps=2))
    for seed in (0, 1):
        out = engine(**shard_batch(hard_batch(seed), model=engine.module))
        engine.backward(out.loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        result = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    engine.eval()
    with torch.no_grad():
        loss = mean_loss(engine(**shard_batch(hard_batch(2), model=engine.module)).loss)
    end_engine(engine)
    return {"weights": result, "evaluation": loss.item()}


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_accumulated_steps_and_evaluation(stage: int) -> None:
    model = tiny_model()
    expected = reference_steps([[hard_batch(0), hard_batch(1)]], model)["weights"]
    with torch.no_grad():
        evaluation = model(**hard_batch(2), use_cache=False).loss.item()
    for result in run_ranks(accumulated_weights, 2, stage):
        assert result["evaluation"] == pytest.approx(evaluation, abs=1e-4)
        for name, weight in expected.items():
            torch.testing.assert_close(
                result["weights"][name], weight, atol=1e-5, rtol=1e-5, msg=name
            )


def two_forwards_in_a_backward(stage: int, rule: dict[str, Any]) -> list[dict[str, Any]]:
    """Weights after a backward of two forwards, and after one of one."""
    config = config_of(stage=stage)
    config["ds_lvx"]["layers"][1].update(rule)
    engine, found = start_engine(config), []
    for seeds in ((0, 1), (2,)):
        losses = [engine(**shard_batch(hard_batch(s), model=engine.module)).loss for s in seeds]
        engine.backward(torch.stack(losses).sum())
        engine.step()
        found.append(weights(engine))
    end_engine(engine)
    return found


@pytest.mark.parametrize(
    ("stage", "rule"),
    [
        (2, {}),
        pytest.param(3, {}, marks=pytest.mark.exhaustive),
        pytest.param(3, {"kv_chunk_tokens": 3}, marks=pytest.mark.exhaustive),
    ],
)
def test_several_forwards_in_one_backward(stage: int, rule: dict[str, Any]) -> None:
    model, expected = tiny_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for seeds in ((0, 1), (2,)):
        losses = [model(**hard_batch(seed), use_cache=False).loss for seed in seeds]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for found in run_ranks(two_forwards_in_a_backward, 2, stage, rule):
        for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            for name, weight in theirs.items():
                torch.testing.assert_close(
                    mine[name], weight, atol=1e-5, rtol=1e-5, msg=f"{name} after step {step}"
                )


def train_unmatched() -> None:
    start_engine({"train_micro_batch_size_per_gpu": 1})


def test_a_config_without_our_section() -> None:
    with pytest.raises(RankError, match='no "ds_lvx" section'):
        run_ranks(train_unmatched, 2)
