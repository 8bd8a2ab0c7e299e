"""The layout of a batch: which part of the rule each method gets, and what is found once."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ds_lvx
from ds_lvx.attention.layout import Layout
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.rule import Rule, Structure
from ds_lvx.kernels.visibility import EVERYTHING, Visibility
from tests.attention.cases import Problem
from tests.elsewhere import ElsewhereByDefault
from tests.ranks import run_ranks

CPU = torch.device("cpu")
PROBLEM = Problem((5, 0, 9), (7, 20, 0), visibility="frames")


def layout_of(problem: Problem) -> Layout:
    whole = problem.whole_visibility()
    lengths = problem.q_lengths, problem.kv_lengths
    return Layout.of_batch(Channel.world(), *lengths, whole, device=CPU)


def mask(rule: Rule | None, queries: int, keys: int, batch: int = 2) -> torch.Tensor:
    if rule is None:
        return torch.ones(batch, queries, keys, dtype=torch.bool)
    return rule.visibility.mask()


def slices(lengths: tuple[int, ...]) -> list[slice]:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [slice(end - n, end) for n, end in zip(lengths, ends, strict=True)]


def test_every_part_is_that_of_the_whole_rule() -> None:
    layout, whole = layout_of(PROBLEM), PROBLEM.whole_visibility()
    assert whole is not None
    rows, columns = slices(PROBLEM.q_lengths), slices(PROBLEM.kv_lengths)
    for q, k in product((None, 0, 1, 2), repeat=2):
        queries, keys = (
            slice(None) if q is None else rows[q],
            slice(None) if k is None else columns[k],
        )
        expected = whole.mask(queries, keys)
        found = mask(layout.rule(queries=q, keys=k), *expected.shape[1:])
        assert torch.equal(found, expected), (q, k)


def from_shards(problem: Problem) -> list[bool]:
    """Whether a bare call's layout gives this rank the parts that its methods take."""
    channel, whole = Channel.world(), problem.whole_visibility()
    shard = problem.shard(channel.rank)["visibility"]
    assert whole is not None
    rows, columns = slices(problem.q_lengths), slices(problem.kv_lengths)
    here = rows[channel.rank], columns[channel.rank]
    answers = []
    for all_queries, all_keys in product((False, True), repeat=2):
        layout = Layout.of_call(
            channel,
            problem.q_lengths,
            problem.kv_lengths,
            shard,
            device=CPU,
            all_queries=all_queries,
            all_keys=all_keys,
        )
        for other in range(channel.size):
            q = other if all_queries else channel.rank
            k = other if all_keys else channel.rank
            expected = whole.mask(rows[q], columns[k])
            found = mask(layout.rule(queries=q, keys=k), *expected.shape[1:])
            answers.append(torch.equal(found, expected))
        if all_queries:
            found = mask(layout.rule(queries=None, keys=channel.rank), rows[-1].stop, 0)
            expected = whole.mask(slice(None), here[1])
            answers.append(torch.equal(found, expected) or expected.numel() == 0)
    return answers


def test_a_bare_call_has_the_same_parts() -> None:
    for answers in run_ranks(from_shards, 3, PROBLEM):
        assert all(answers)


def test_ulysses_gets_the_rule_with_every_shard_as_long_as_the_longest() -> None:
    """Where no order suits the rows; else tests/attention/test_order.py."""
    arrival = layout_of(PROBLEM).arrival(2)
    rule, whole = arrival.rule, PROBLEM.whole_visibility()
    assert arrival.queries is None
    assert arrival.keys is None
    assert rule is not None
    assert whole is not None
    seen = rule.visibility.mask()
    assert seen.shape == (2, 27, 60)
    kept_q = torch.cat([torch.arange(n) + 9 * i for i, n in enumerate(PROBLEM.q_lengths)])
    kept_k = torch.cat([torch.arange(n) + 20 * i for i, n in enumerate(PROBLEM.kv_lengths)])
    assert torch.equal(seen[:, kept_q][:, :, kept_k], whole.mask())
    assert seen.sum() == whole.mask().sum()


def test_where_all_see_all_there_is_no_rule() -> None:
    """A shard of a larger rule as well: its kernel then needs no mask."""
    whole = Visibility(
        torch.tensor([[0, 0, 1, 1]]).int(),
        torch.tensor([[1, 1, 2, 2]]).int(),
        torch.tensor([[0, 0, 0, 1, 1]]).int(),
    )
    layout = Layout.of_batch(Channel.world(), (2, 2), (3, 2), whole, device=CPU)
    assert layout.structure is Structure.STAIRCASE
    assert layout.rule(queries=0, keys=0) is None
    assert layout.rule(queries=1, keys=1) is None
    assert layout.rule(queries=0, keys=1) is not None
    assert Layout(Channel.world(), (1,), (1,), device=CPU).structure is Structure.ALL


def test_a_part_is_the_same_object_each_time() -> None:
    layout = layout_of(PROBLEM)
    assert layout.rule(queries=0, keys=1) is layout.rule(queries=0, keys=1)
    assert layout.arrival(2) is layout.arrival(2)
    q = torch.empty(2, 3, 4, 16)
    assert layout.kernel("native", q) is layout.kernel("native", q[:, :1])
    assert layout.kernel("native", q) is not layout.kernel("reference", q)
    asked: list[int] = []
    for _ in range(3):
        layout.settled("kernel", lambda: asked.append(1) or "native")
    assert asked == [1]


def test_a_rule_of_other_lengths_is_refused() -> None:
    rule = Visibility.all(1, 4, EVERYTHING % 7, device=CPU)
    with pytest.raises(ValueError, match=r"got 4 queries and 1 keys; expected .* 5 and 1"):
        Layout.of_batch(Channel.world(), (2, 3), (1, 0), rule, device=CPU)


def gradients(operator: Any, *, written: bool, checkpointed: bool) -> list[torch.Tensor]:
    """Of a call in a group of one whose rule is written over before backward."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 8, generator=generator) for n in (3, 6, 6))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    bounds = (torch.tensor([row], dtype=torch.int32) for row in ([0, 1, 0], [1, 2, 3]))
    rule = Visibility(*bounds, torch.arange(6, dtype=torch.int32)[None] // 2)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = operator(q, k, v, visibility=rule)
        return found

    function = partial(ds_lvx.checkpointing(checkpoint), run, use_reentrant=False)
    with ElsewhereByDefault():
        out = function(*inputs) if checkpointed else run(*inputs)
    for part in (rule.q_start, rule.q_end, rule.kv_pos) if written else ():
        part.fill_(EVERYTHING)
    out.square().sum().backward()
    return [x.grad for x in inputs if x.grad is not None]


def recomputed(q: Any, k: Any, v: Any, *, visibility: Visibility) -> torch.Tensor:
    features = torch.cat((k, v), dim=-1)
    return ds_lvx.lv_xattn_recompute(
        q, features, lambda f: tuple(f.split(8, dim=-1)), visibility=visibility
    )


OPERATORS = {
    "gather": partial(ds_lvx.lv_xattn, schedule="gather"),
    "replicated": partial(ds_lvx.lv_xattn, schedule="replicated"),
    "recompute": recomputed,
    "ring": ds_lvx.ring_attention,
    "ulysses": ds_lvx.ulysses_attention,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_rule_that_is_written_over_after_forward_is_backwards_all_the_same(name: str) -> None:
    for checkpointed in (False, True):
        found, expected = (
            gradients(OPERATORS[name], written=written, checkpointed=checkpointed)
            for written in (True, False)
        )
        assert len(expected) == 3
        for mine, right in zip(found, expected, strict=True):
            assert torch.equal(mine, right), checkpointed
