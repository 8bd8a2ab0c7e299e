"""``auto``: the planner's choice in a model, the same on every rank, and told at the start."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

import ds_lvx
from ds_lvx.attention.auto import CLUSTERS, METHODS, NOTES, Notes, Wanted, explain
from ds_lvx.attention.settle import settle
from ds_lvx.attention.shape import AttentionShape
from ds_lvx.distributed.channel import Channel
from ds_lvx.plan.cards import CARDS
from ds_lvx.plan.choose import Choice, cheapest
from ds_lvx.plan.cluster import Cluster, Link, from_card
from tests.models.mllama_case import ds_config, hard_batch, start_engine, tiny_model
from tests.ranks import run_ranks

HEADS = {"heads": 32, "kv_heads": 8, "head_dim": 128}
SLOW = Link.of(bytes_per_s=25e6, latency_s=1e-4)
FAST = Link.of(bytes_per_s=300e9, latency_s=1e-6)


def cluster(link: Link, gpus: int = 4) -> Cluster:
    return from_card(CARDS["A100-40"], gpus=gpus, within=link, across=link)


def test_what_a_rule_leaves_open() -> None:
    assert Wanted("auto").methods == METHODS
    assert Wanted("auto", recompute_kv=True).methods == ("lvx",)
    assert not Wanted("ring").is_open
    assert not Wanted("lvx", "gather").is_open
    assert Wanted("lvx").schedules == ("gather", "ring")
    assert Wanted("lvx", chunked=True).schedules == ("gather",)
    assert Wanted("auto", "ring").schedules == ("ring",)


def test_the_explanation_names_a_choice_for_each_size() -> None:
    text = explain(
        Wanted(), cluster(SLOW), heads=HEADS, ranks=4, sizes=((192, 750_000), (65_536, 65_536))
    )
    first, second = text.split("; ")
    assert first.startswith("192 queries x 750,000 keys: lvx ")
    assert second.startswith("65,536 queries x 65,536 keys: ")


# ---- in a model


def record(link: Link) -> dict[str, Any]:
    return cluster(link, gpus=2).record()


def run_auto(
    rules: dict[str, Any], clusters: list[dict[str, Any]], *, stage: int, checkpoint: bool
) -> tuple[float, dict[str, float], list[str]]:
    """A training step; its loss, gradients' norms, and which collectives ran."""
    mine = Cluster.of(clusters[Channel.world().rank])
    config = ds_config(stage=stage, sp_size=2, **rules)
    if checkpoint:
        config["activation_checkpointing"] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ds_lvx.attention.auto.current", lambda device, world: mine)
        engine = start_engine(config)
        with ds_lvx.traffic() as counted:
            out = engine(**ds_lvx.shard_batch(hard_batch(), model=engine.module))
            engine.backward(out.loss)
    loss = ds_lvx.mean_loss(out.loss).item()
    engine.step()
    weights = {
        name: p.detach().double().norm().item() for name, p in engine.module.named_parameters()
    }
    ds_lvx.shutdown(engine)
    return loss, weights, sorted(counted.per_collective)


AUTO = {"cross": {"method": "auto"}, "self_attn": "auto"}


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_auto_trains_as_a_named_method_does(checkpoint: bool) -> None:
    given = {"stage": 1, "checkpoint": checkpoint}
    slow = [record(SLOW)] * 2
    named = run_ranks(run_auto, 2, {"cross": {"method": "lvx"}, "self_attn": "ring"}, slow, **given)
    found = run_ranks(run_auto, 2, AUTO, slow, **given)
    for (loss, weights, _), (expected, others, _) in zip(found, named, strict=True):
        assert loss == pytest.approx(expected, abs=1e-6)
        assert weights == pytest.approx(others, rel=1e-5)


def run_by_source(sources: list[str], *, checkpoint: bool) -> list[str]:
    """A step in which what is chosen depends on where the facts come from; what ran."""
    known = cluster(SLOW, gpus=2)
    mine = replace(known, source=sources[Channel.world().rank])

    def by_source(shape: AttentionShape, found: Cluster, **options: Any) -> Choice:
        # Under a checkpoint the second pass has a gradient, and must not be asked again.
        method = found.source if shape.backward else "ulysses"
        return replace(cheapest(shape, found, **options), method=method, schedule="gather")

    config, told = ds_config(stage=0, sp_size=2, **AUTO), set()
    if checkpoint:
        config["activation_checkpointing"] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ds_lvx.attention.auto.current", lambda device, world: mine)
        patch.setattr("ds_lvx.attention.auto.cheapest", by_source)
        patch.setattr(NOTES, "about", lambda *_, name, rank: told.add(name))
        engine = start_engine(config)
        with ds_lvx.traffic() as counted:
            out = engine(**ds_lvx.shard_batch(hard_batch(), model=engine.module))
            engine.backward(out.loss)
        ds_lvx.shutdown(engine)
    # Once for all layers of a kind.
    assert {name.removeprefix("model.language_model.layers.") for name in told} == {
        "*.self_attn",
        "*.cross_attn",
    }
    return sorted(counted.per_collective)


@pytest.mark.parametrize("checkpoint", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_ranks_that_know_different_links_take_the_first_ranks(checkpoint: bool) -> None:
    """Each by its own facts, they would wait for each other for ever."""
    given = {"checkpoint": checkpoint}
    found = run_ranks(run_by_source, 2, ["lvx", "ring"], **given)
    assert found == [["all_gather", "all_to_all"]] * 2
    found = run_ranks(run_by_source, 2, ["ring", "lvx"], **given)
    assert found == [["send_recv"]] * 2


def settled_schedules() -> list[str]:
    """A schedule a call, and the control messages of the two calls."""
    q, k = torch.randn(1, 4, 2, 16), torch.randn(1, 6, 2, 16)
    given: dict[str, Any] = {"visibility": None, "softmax_scale": None, "kernel": "auto"}
    calls = []
    with ds_lvx.traffic() as counted:
        for _ in range(2):
            call = settle("lv_xattn", q, {"k": k, "v": k}, group=None, schedule="auto", **given)
            calls.append(f"{call.schedule} {counted.control.calls}")
    return calls


def test_an_operator_agrees_on_its_cluster_once() -> None:
    for calls in run_ranks(settled_schedules, 2):
        assert [int(call.split()[1]) for call in calls] == [2, 3]
        assert calls[0].split()[0] in ("gather", "ring")


def start_table(rules: dict[str, Any]) -> tuple[str, str]:
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        engine = start_engine(ds_config(stage=0, sp_size=2, **rules))
    group = engine.ds_lvx.groups.channel
    source = CLUSTERS.of(group, torch.device("cpu")).source
    ds_lvx.shutdown(engine)
    return printed.getvalue(), source


def test_the_start_table_explains_auto() -> None:
    text, source = run_ranks(start_table, 2, AUTO)[0]
    lines = [line for line in text.splitlines() if line.startswith("auto")]
    assert len(lines) == 3
    assert any(
        "cross_attn" in line and "256 queries x 1,000,000 keys: lvx" in line for line in lines
    )
    assert any("self_attn" in line and "16,384 queries x 16,384 keys: " in line for line in lines)
    assert lines[-1] == f"auto: predicted from {source}"
    fixed = {"cross": {"method": "lvx", "schedule": "ring"}, "self_attn": "ring"}
    assert "auto:" not in run_ranks(start_table, 2, fixed)[0][0]


# ---- what is said about inputs too small to share


def test_small_inputs_are_told_once_and_by_one_rank(caplog: pytest.LogCaptureFixture) -> None:
    shape = AttentionShape.even(queries=64, keys=64, ranks=4, **HEADS)
    choice = cheapest(shape, cluster(SLOW))
    assert choice.one_rank_serves_best
    notes = Notes()
    with caplog.at_level(logging.WARNING, logger="ds_lvx"):
        for rank in (1, 0, 0):
            notes.about(choice, shape, name="cross_attn", rank=rank)
    (record,) = caplog.records
    assert "64 queries and 64 keys are so few that one rank alone would be faster" in record.message
    large = replace(shape, kv_lengths=(250_000,) * 4)
    with caplog.at_level(logging.WARNING, logger="ds_lvx"):
        notes.about(cheapest(large, cluster(FAST)), large, name="other", rank=0)
    assert len(caplog.records) == 1


def test_local_layers_are_left_alone() -> None:
    config = ds_config(stage=0, sp_size=1, cross={"method": "auto"}, self_attn="auto")
    config["ds_lvx"]["layers"] = [{"match": "*", "method": "auto"}]
    from ds_lvx.config import LVXConfig
    from ds_lvx.models import family_of
    from ds_lvx.models.layers import make_plans

    family, model = family_of(tiny_model())
    layers = family.attention_layers(model)
    plans = make_plans(layers, LVXConfig.from_ds_config(config), sp_size=2)
    assert {plan.kind: plan.method for plan in plans} == {
        "local": "none",
        "cross": "auto",
        "self": "auto",
    }
