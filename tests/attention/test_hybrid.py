"""Ulysses inside subgroups and another method across: exact, and its bytes by formula."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

import ds_lvx
from ds_lvx.attention.shape import AttentionShape, Hybrid
from ds_lvx.plan.cards import CARDS
from ds_lvx.plan.cluster import Link, from_card
from ds_lvx.plan.cost import cost, obstacle
from ds_lvx.plan.walks import label
from tests.attention.cases import Problem, assemble, largest_error, run_problems
from tests.ranks import run_ranks
from tests.sent import bytes_sent

SHARDS = {
    2: [((6, 6), (30, 30)), ((7, 2), (0, 43))],
    4: [
        ((3, 3, 3, 3), (12, 12, 12, 12)),
        ((6, 1, 0, 4), (0, 25, 9, 14)),
        ((0, 0, 5, 7), (9, 3, 0, 0)),  # a subgroup without queries, one without keys
    ],
}
WAYS = [("ring", "auto"), ("lvx", "ring"), ("lvx", "gather"), ("lvx", "auto")]
HEADS = [(4, 2), (4, 4), (5, 1), (6, 3)]  # some divide by the subgroup, some do not


def extra(ulysses: int, across: str, schedule: str) -> dict[str, Any]:
    return {"ulysses": ulysses, "across": across, "schedule": schedule}


def grid(ranks: int, every: int = 1) -> list[tuple[Problem, str]]:
    """All lengths, rules and ways, with heads in turn; or ``every`` second, as on a chessboard.

    Half of them have a gradient of lse.
    """
    sizes = [size for size in (1, 2, 4) if ranks % size == 0]
    lengths = itertools.product(SHARDS[ranks], ("none", "frames", "causal"))
    cases = []
    for number, ((q_lengths, kv_lengths), visibility) in enumerate(lengths):
        for turn, (size, way) in enumerate(itertools.product(sizes, WAYS)):
            if (number + turn) % every:
                continue
            heads, kv_heads = HEADS[(number + turn) // every % len(HEADS)]
            problem = Problem(
                q_lengths,
                kv_lengths,
                heads=heads,
                kv_heads=kv_heads,
                visibility=visibility,
                lse_weight=0.5 * (turn % 2),
                extra=extra(size, *way),
            )
            cases.append((problem, "hybrid"))
    return cases


@pytest.mark.parametrize(
    ("ranks", "device", "every"),
    [
        (2, "cpu", 1),
        pytest.param(4, "cpu", 2, marks=pytest.mark.slow),
        pytest.param(4, "cpu", 1, marks=pytest.mark.exhaustive),
        pytest.param(4, "cuda", 1, marks=pytest.mark.gpus(4)),
    ],
)
def test_hybrids_match_the_oracle(ranks: int, device: str, every: int) -> None:
    cases = [(replace(problem, device=device), method) for problem, method in grid(ranks, every)]
    answers = run_ranks(run_problems, ranks, cases, device=device)
    for index, (problem, _) in enumerate(cases):
        errors = largest_error(assemble([a[index] for a in answers]), problem.oracle())
        assert max(errors.values()) < (1e-5 if device == "cpu" else 1e-4), (problem, errors)


def predicted(problem: Problem, rank: int) -> tuple[float, float]:
    shape = AttentionShape(
        problem.batch,
        problem.q_lengths,
        problem.kv_lengths,
        problem.heads,
        problem.kv_heads,
        problem.head_dim,
        problem.dtype.itemsize,
        visibility=problem.visibility != "none",
    )
    hybrid = Hybrid(problem.extra["ulysses"], problem.extra["across"])
    way = label(hybrid.name, problem.extra["schedule"])
    found = bytes_sent(shape, way, rank=rank, factors=problem.dtype == torch.bfloat16)
    return found.rule + found.forward, found.backward


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_bytes_are_those_of_the_formula(ranks: int) -> None:
    lengths = [((16,) * ranks, (40,) * ranks), *SHARDS[ranks][1:]]
    cases = [
        (
            Problem(
                q_lengths,
                kv_lengths,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=32,
                dtype=dtype,
                visibility=visibility,
                extra=extra(2, *way),
            ),
            "hybrid",
        )
        for (q_lengths, kv_lengths), way, (heads, kv_heads) in itertools.product(
            lengths, WAYS[:3], HEADS[1:3]
        )
        for dtype, visibility in ((torch.float32, "frames"), (torch.bfloat16, "none"))
    ]
    answers = run_ranks(run_problems, ranks, cases)
    for index, (problem, _) in enumerate(cases):
        for rank, answer in enumerate(answers):
            found = answer[index]["forward"].bytes_sent, answer[index]["backward"].bytes_sent
            assert found == predicted(problem, rank), problem


@pytest.mark.parametrize("way", ["hybrid 4 ring", "hybrid 8 lvx gather", "hybrid 16 lvx ring"])
def test_the_planner_predicts_them(way: str) -> None:
    """The bytes of its walk are those of the formulas; the parts add up to the whole."""
    shape = AttentionShape(1, (512,) * 16, (4096,) * 16, 32, 8, 128)
    cluster = from_card(CARDS["H100"], gpus=16, gpus_per_node=8)
    found, sent = cost(shape, cluster, way), bytes_sent(shape, way)
    for each, nbytes in ((found.forward, sent.forward), (found.backward, sent.backward)):
        assert each.bytes_sent == pytest.approx(nbytes, rel=1e-9)
        parts = each.kernel_s + each.projection_s + each.other_s + each.exposed_s
        assert parts == pytest.approx(each.seconds)


def test_across_nodes_a_hybrid_beats_both_of_its_parts() -> None:
    """Few heads of K and V: ulysses repeats them and sends q and out between the nodes, a ring
    sends K and V of every rank there."""
    shape = AttentionShape(1, (2048,) * 16, (2048,) * 16, 32, 8, 128)
    slow = from_card(CARDS["H100"], gpus=16, gpus_per_node=8, across=Link.of(5e9, 2e-5))
    times = {way: cost(shape, slow, way).seconds for way in ("hybrid 8 ring", "ring", "ulysses")}
    assert min(times, key=lambda way: times[way]) == "hybrid 8 ring", times


@pytest.mark.parametrize(
    ("way", "words"),
    [("hybrid 3 ring", "3 does not divide 4"), ("hybrid 4 ring", "2 heads do not reach 4")],
)
def test_the_planner_knows_what_cannot_run(way: str, words: str) -> None:
    shape = AttentionShape(1, (4,) * 4, (4,) * 4, 2, 2, 16)
    assert words in str(obstacle(shape, way))
    with pytest.raises(ValueError, match=words):
        cost(shape, from_card(CARDS["H100"], gpus=4, gpus_per_node=4), way)


def refused(ulysses: int, across: str, schedule: str) -> str:
    q = torch.zeros(1, 4, 2, 8)
    try:
        ds_lvx.hybrid_attention(q, q, q, ulysses=ulysses, across=across, schedule=schedule)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((3, "ring", "auto"), "ulysses: got 3 for a group of 2 ranks; expected one of [1, 2]"),
        ((0, "ring", "auto"), "ulysses: got 0"),
        ((2, "rings", "auto"), "across: got 'rings'; expected one of ['ring', 'lvx']"),
        ((2, "ring", "gather"), "schedule: got 'gather' with across 'ring'"),
        ((2, "lvx", "replicated"), "schedule 'replicated'"),
    ],
)
def test_mistakes_are_named_on_every_rank(arguments: tuple[int, str, str], words: str) -> None:
    for answer in run_ranks(refused, 2, *arguments):
        assert words in answer
