"""Every method against the float64 oracle: out, lse and all gradients, on real ranks."""

from __future__ import annotations

import pytest
import torch

from tests.attention.cases import Problem, assemble, largest_error, run_problems
from tests.ranks import run_ranks

SHARDS = {
    1: [((5,), (40,))],
    2: [((6, 6), (30, 30)), ((7, 2), (11, 43)), ((5, 0), (0, 33))],
    3: [((4, 4, 4), (20, 20, 20)), ((1, 0, 9), (17, 0, 30)), ((3, 5, 2), (0, 0, 41))],
    4: [((3, 3, 3, 3), (12, 12, 12, 12)), ((6, 1, 0, 4), (0, 25, 9, 14))],
}
METHODS = ["lvx-ring", "lvx-gather", "recompute-ring", "recompute-gather", "ring", "ulysses"]
HEADS = [(4, 2), (4, 4), (4, 1), (6, 2)]
LIMIT = 1e-5


def _case(problem: Problem, method: str) -> tuple[Problem, str]:
    name, _, schedule = method.partition("-")
    extra = {"schedule": schedule} if schedule else {}
    return Problem(**{**problem.__dict__, "extra": extra}), name


def _grid(ranks: int) -> list[tuple[Problem, str]]:
    cases = []
    for index, (q_lengths, kv_lengths) in enumerate(SHARDS[ranks]):
        for number, visibility in enumerate(("none", "frames", "causal")):
            heads, kv_heads = HEADS[(index + number) % len(HEADS)]
            problem = Problem(
                q_lengths,
                kv_lengths,
                heads=heads,
                kv_heads=kv_heads,
                visibility=visibility,
                seed=index,
            )
            cases += [_case(problem, method) for method in METHODS]
    return cases


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_method_matches_the_oracle_in_fp32(ranks: int) -> None:
    cases = _grid(ranks)
    answers = run_ranks(run_problems, ranks, cases)
    for index, (problem, method) in enumerate(cases):
        errors = largest_error(assemble([a[index] for a in answers]), problem.oracle())
        assert max(errors.values()) < LIMIT, (method, problem, errors)
