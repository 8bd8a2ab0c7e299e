"""Which method the planner takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ds_lvx.attention.shape import AttentionShape
from ds_lvx.plan.cards import CARDS
from ds_lvx.plan.choose import cheapest
from ds_lvx.plan.cluster import Cluster, from_card
from ds_lvx.plan.cost import cost

CLUSTER = from_card(CARDS["H100"], gpus=16)


def shape(queries: int, keys: int, ranks: int = 16) -> AttentionShape:
    return AttentionShape.even(
        queries=queries, keys=keys, ranks=ranks, heads=32, kv_heads=8, head_dim=128
    )


def pick(queries: int, keys: int, cluster: Cluster = CLUSTER) -> str:
    return cheapest(shape(queries, keys, cluster.gpus), cluster).method


def test_few_queries_over_many_keys_travel() -> None:
    assert pick(384, 10**6) == "lvx"
    assert pick(4096, 4 * 10**6) == "lvx"


def test_keys_travel_where_they_are_fewer() -> None:
    assert pick(10**6, 4096) != "lvx"


def test_the_choice_is_the_fastest_of_all() -> None:
    for queries in (64, 4096, 65_536):
        call = shape(queries, 2**20)
        choice = cheapest(call, CLUSTER)
        times = [
            cost(call, CLUSTER, way).seconds
            for way in ("lvx ring", "lvx gather", "ring", "ulysses")
        ]
        assert choice.seconds == min(times)


def test_an_input_that_one_rank_serves_best_is_named_so() -> None:
    small = cheapest(shape(64, 64), CLUSTER)
    assert small.one_rank_serves_best
    assert "one rank alone would be faster" in small.reason
    large = cheapest(shape(384, 10**7), CLUSTER)
    assert not large.one_rank_serves_best
    assert "one rank" not in large.reason


def test_what_cannot_run_is_left_out_with_the_reason() -> None:
    wide = from_card(CARDS["H100"], gpus=64)
    choice = cheapest(shape(384, 10**6, 64), wide)
    assert choice.method != "ulysses"
    with pytest.raises(ValueError, match=r"no method.*32 heads do not reach 64 ranks"):
        cheapest(shape(384, 10**6, 64), wide, methods=("ulysses",))


def test_queries_that_are_too_many_are_not_gathered() -> None:
    choice = cheapest(replace(shape(2**18, 2**20), batch=4), CLUSTER, methods=("lvx",))
    assert choice.schedule == "ring"


def test_the_answer_is_the_same_every_time_and_for_every_rank() -> None:
    first = cheapest(shape(384, 10**6), CLUSTER)
    again = cheapest(shape(384, 10**6), Cluster.of(CLUSTER.record()))
    assert first == again


def test_only_what_is_allowed_is_taken() -> None:
    choice = cheapest(shape(384, 10**6), CLUSTER, methods=("lvx",), schedules=("ring",))
    assert (choice.method, choice.schedule) == ("lvx", "ring")
    assert "next" not in choice.reason
