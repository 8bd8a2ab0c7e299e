"""Zigzag pieces of a causal text: even work on every rank and in every step, the same results."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_lvx
from ds_lvx import Visibility
from ds_lvx.attention.layout import Layout
from ds_lvx.attention.zigzag import dealt
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.visibility import EVERYTHING
from tests.attention.cases import Problem, assemble, largest_error, run_problems
from tests.ranks import run_ranks

METHODS = ["lvx-ring", "lvx-gather", "recompute-ring", "ring", "ulysses"]


@pytest.mark.parametrize("ranks", range(2, 9))
@pytest.mark.parametrize("length", [32768, 2048, 1999, 1001])
def test_every_step_is_even(ranks: int, length: int) -> None:
    """Pairs that are visible when queries of one rank meet keys of another."""
    held = dealt(length, ranks)
    assert torch.equal(torch.cat(held).sort().values, torch.arange(length))
    pairs = torch.tensor(
        [[int(torch.searchsorted(keys, rows, right=True).sum()) for keys in held] for rows in held]
    ).double()
    at_home = pairs.diag()
    away = pairs[~torch.eye(ranks, dtype=torch.bool)]
    for each in (pairs.sum(dim=1), pairs.sum(dim=0), at_home, away):
        assert (each / each.mean() - 1).abs().max() < 0.1


def test_runs_of_neighbours_are_not_even() -> None:
    """Else the test above says nothing."""
    rows = torch.arange(2048).split(512)
    pairs = [int((each + 1).sum()) for each in rows]
    assert max(pairs) > 6 * min(pairs)


def layout_of(length: int, ranks: int) -> Layout:
    held = torch.cat(dealt(length, ranks)).int()[None]
    lengths = tuple(map(len, dealt(length, ranks)))
    causal = Visibility(torch.zeros_like(held), held + 1, held)
    return Layout.of_batch(Channel(None), lengths, lengths, causal, device=torch.device("cpu"))


@pytest.mark.parametrize("length", [2048, 1999])
def test_a_kernel_computes_no_more_than_is_visible(length: int) -> None:
    """Blocks end where pieces do, whichever rank's queries meet whichever's keys."""
    layout = layout_of(length, 4)
    for queries in range(4):
        for keys in range(4):
            rule = layout.rule(queries=queries, keys=keys)
            assert rule is not None
            seen = int(rule.visibility.mask().sum())
            found = rule.blocks(queries_per_block=256, keys_per_block=256)
            computed = sum(
                (b.queries.stop - b.queries.start) * (b.keys.stop - b.keys.start) for b in found
            )
            if queries != keys:
                assert computed == seen
                assert not any(block.masked for block in found)
            else:
                assert computed <= 1.52 * seen  # of squares on the diagonal half is visible
            joined = rule.blocks(queries_per_block=128, keys_per_block=128, most_keys=length)
            if queries != keys:
                assert [block.masked for block in joined] == [False]
            else:
                assert all(block.causal for block in joined if block.masked)


def test_all_queries_over_the_keys_of_a_rank() -> None:
    """What the gather schedule computes at once, and Ulysses of all."""
    layout = layout_of(2048, 4)
    for keys in (0, 3, None):
        rule = layout.rule(queries=None, keys=keys)
        assert rule is not None
        seen = int(rule.visibility.mask().sum())
        found = rule.blocks(queries_per_block=2048, keys_per_block=512)
        sizes = [(b.queries.stop - b.queries.start, b.keys.stop - b.keys.start) for b in found]
        assert sum(rows * columns for rows, columns in sizes) < 1.3 * seen


def test_positions_that_nobody_has_cut_no_small_blocks() -> None:
    keys = torch.arange(1000, dtype=torch.int32)[None].clone()
    keys[0, 5::7] = EVERYTHING
    rows = torch.arange(1000, dtype=torch.int32)[None]
    layout = Layout.of_batch(
        Channel(None),
        (1000,),
        (1000,),
        Visibility(torch.zeros_like(rows), rows + 1, keys),
        device=torch.device("cpu"),
    )
    rule = layout.rule(queries=0, keys=0)
    assert rule is not None
    covered = torch.zeros(1, 1000, 1000, dtype=torch.int32)
    for block in rule.blocks(queries_per_block=1000, keys_per_block=512):
        mask = rule.mask(block)
        covered[:, block.queries, block.keys] += 1 if mask is None else mask.int()
        assert block.keys.stop - block.keys.start >= 60
    assert torch.equal(covered, rule.visibility.mask().int())


@dataclass(frozen=True)
class Zigzag(Problem):
    """A causal problem whose rows are those of zigzag shards, one rank after the other."""

    def whole_visibility(self) -> Visibility:
        held = torch.cat(dealt(sum(self.q_lengths), self.ranks)).int().repeat(self.batch, 1)
        return Visibility(torch.zeros_like(held), held + 1, held)


def _problems(ranks: int, *lengths: int) -> list[tuple[Problem, str]]:
    cases: list[tuple[Problem, str]] = []
    for length in lengths:
        shares = tuple(map(len, dealt(length, ranks)))
        problem = Zigzag(shares, shares, batch=1)
        for method in METHODS:
            name, _, schedule = method.partition("-")
            extra = {"schedule": schedule} if schedule else {}
            cases.append((replace(problem, extra=extra), name))
    return cases


@pytest.mark.parametrize("ranks", [2, 3, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_every_method_matches_the_oracle(ranks: int) -> None:
    """Pieces longer than a block's least, shorter, and one of no token; uneven lengths."""
    cases = _problems(ranks, 67 * 2 * ranks - 3, 11, ranks + 1)
    answers = run_ranks(run_problems, ranks, cases)
    for index, (problem, method) in enumerate(cases):
        errors = largest_error(assemble([a[index] for a in answers]), problem.oracle())
        assert max(errors.values()) < 1e-5, (method, problem, errors)


def as_documented(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    here = ds_lvx.zigzag(q.shape[1])
    places = here[None].to(torch.int32)
    causal = ds_lvx.Visibility(torch.zeros_like(places), places + 1, places)
    out = ds_lvx.ring_attention(*(x[:, here] for x in (q, k, v)), visibility=causal)
    order = ds_lvx.gather_sequence(here, 0).argsort()
    return {"here": here, "whole": ds_lvx.gather_sequence(out)[:, order]}


def test_a_bare_operator_by_its_places() -> None:
    q, k, v = (torch.randn(1, 23, 4, 8) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    )
    results = run_ranks(as_documented, 3, q, k, v)
    assert [len(result["here"]) for result in results] == [8, 8, 7]
    for result in results:
        assert (result["here"].diff() > 0).all()
        torch.testing.assert_close(result["whole"], expected.transpose(1, 2))


def test_one_process_holds_all_of_it() -> None:
    assert torch.equal(ds_lvx.zigzag(5), torch.arange(5))
    with pytest.raises(ValueError, match="length=-1; expected the number of tokens"):
        ds_lvx.zigzag(-1)
