"""What follows from a rule: blocks, lists, structure, parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ds_lvx import Visibility
from ds_lvx.attention.oracle import attention_oracle
from ds_lvx.kernels import lists, native
from ds_lvx.kernels import rule as rule_module
from ds_lvx.kernels.interface import Problem
from ds_lvx.kernels.rule import Rule, Structure


def random_rule(seed: int, *, batch: int = 2, queries: int = 13, keys: int = 40) -> Visibility:
    """Runs and holes; every second one with keys in order."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.randint(-1, 6, (batch, keys), generator=generator).int()
    if seed % 2:
        position = position.sort(dim=1).values
    start = torch.randint(-1, 6, (batch, queries), generator=generator).int()
    if seed % 3 == 0:
        start = start.sort(dim=1).values  # longer runs of queries that see the same
    length = torch.randint(0, 3, (batch, queries), generator=generator).int()
    return Visibility(start, start + length, position)


def with_gaps(sees: Visibility, seed: int) -> Visibility:
    """Wider ranges with random gaps; some are empty, or end before they begin."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(-1, 6, sees.q_start.shape, generator=generator).int()
    length = torch.randint(-1, 4, start.shape, generator=generator).int()
    return replace(sees, q_end=sees.q_end + 4, gap_start=start, gap_end=start + length)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("known", [True, False], ids=["on the host", "on the device"])
def test_blocks_cover_exactly_what_is_visible(
    seed: int, gaps: bool, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every visible pair lies in one block, and what a block leaves unmasked is visible."""
    sees = with_gaps(random_rule(seed), seed) if gaps else random_rule(seed)
    rule = Rule(sees)
    if not known:
        monkeypatch.setattr(rule, "host", None)
    covered = torch.zeros(2, 13, 40, dtype=torch.int32)
    for block in rule.blocks(queries_per_block=5, keys_per_block=7):
        part = covered[:, block.queries, block.keys]
        mask = rule.mask(block)
        part += torch.ones_like(part) if mask is None else mask.int()
        if known:
            wholly = bool(sees.mask(block.queries, block.keys).all())
            assert block.masked != wholly or (gaps and wholly)
    assert torch.equal(covered, sees.mask().int())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("gaps", [False, True])
def test_blocks_that_join_cover_the_same(seed: int, gaps: bool) -> None:
    sees = random_rule(seed, batch=1)
    sees = with_gaps(sees, seed) if gaps else sees
    covered = torch.zeros(1, 13, 40, dtype=torch.int32)
    found = Rule(sees).blocks(queries_per_block=2, keys_per_block=3, most_keys=12)
    for block in found:
        covered[:, block.queries, block.keys] += (
            Rule(sees).visibility.mask(block.queries, block.keys).int()
        )
        assert block.masked or block.keys.stop - block.keys.start <= 12
    assert torch.equal(covered, sees.mask().int())
    keys = [block.keys.start for block in found]
    assert keys == sorted(keys)


@pytest.mark.parametrize("width", [1, 3])
def test_blocks_that_are_causal_squares_say_so(width: int) -> None:
    """Positions may have gaps; a query that sees a key less, or more, makes it another square."""
    position = width * torch.arange(40, dtype=torch.int32)[None]
    start, end = torch.zeros_like(position), position + 1
    squares = [slice(0, 10), slice(10, 20), slice(20, 30), slice(30, 40)]

    def causal(end: Tensor, start: Tensor = start) -> list[slice]:
        rule = Rule(Visibility(start, end, position))
        found = rule.blocks(queries_per_block=10, keys_per_block=10, most_keys=40)
        assert all(block.masked and block.keys == block.queries for block in found if block.causal)
        return [block.keys for block in found if block.causal]

    assert causal(end) == squares
    one = torch.arange(40) == 14
    assert causal(end - width * one.int()) == [squares[0], *squares[2:]]
    assert causal(end + width * one.int()) == [squares[0], *squares[2:]]
    assert causal(end, start + (11 * width) * one.int()) == [squares[0], *squares[2:]]


def test_a_causal_square_beside_keys_that_all_see_stays_one() -> None:
    """Of the last queries of a text: other blocks of its keys join."""
    index = torch.arange(2 * native._CPU_SQUARE, dtype=torch.int32)[None]
    last = index[:, native._CPU_SQUARE :]
    sees = Visibility(torch.zeros_like(last), last + 1, index)
    torch.manual_seed(0)
    lengths = (last.shape[1], index.shape[1], index.shape[1])
    q, k, v = (torch.randn(1, length, 1, 16, dtype=torch.float64) for length in lengths)
    out, _ = native.NativeKernel().forward(Problem(q, k, v, Rule(sees), softmax_scale=0.25))
    assert_close(out, attention_oracle(q, k, v, visibility=sees)[0])


def test_blocks_over_the_same_keys_stand_side_by_side() -> None:
    keys = [
        block.keys for block in Rule(random_rule(4)).blocks(queries_per_block=3, keys_per_block=9)
    ]
    assert keys == sorted(keys, key=lambda each: each.start)


def test_blocks_that_nobody_sees_are_left_out() -> None:
    rows = torch.arange(8, dtype=torch.int32)[None]
    rule = Rule(Visibility(rows, rows + 1, torch.arange(800, dtype=torch.int32)[None] // 10))
    found = rule.blocks(queries_per_block=8, keys_per_block=10)
    assert [(b.queries, b.keys, b.masked) for b in found] == [
        (slice(i, i + 1), slice(10 * i, 10 * i + 10), False) for i in range(8)
    ]


@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize("gaps", [False, True])
def test_lists_hold_every_pair_that_meets(seed: int, of_keys: bool, gaps: bool) -> None:
    sees = with_gaps(random_rule(seed), seed) if gaps else random_rule(seed)
    if seed > 5:  # blocks in a row of the same positions, as those of a frame
        sees = replace(sees, kv_pos=sees.kv_pos // 3)
    group = 2 + seed % 2
    order, counts = Rule(sees).lists(rows=4, keys=7, group=group, of_keys=of_keys)
    mask = sees.mask().repeat_interleave(group, dim=1)
    for sample in range(2):
        for one in range(counts.shape[1]):
            count, whole = counts[sample, one].tolist()
            listed = order[sample, one, :count].tolist()
            assert listed[:whole] == sorted(set(listed[:whole]))
            assert listed[whole:] == sorted(set(listed[whole:]) - set(listed[:whole]))
            for other in range(order.shape[2]):
                tile, block = (other, one) if of_keys else (one, other)
                seen = mask[sample, 4 * tile : 4 * tile + 4, 7 * block : 7 * block + 7]
                assert other in listed or not seen.any()
                wholly = bool(seen.all()) and seen.shape == (4, 7)
                assert (other in listed[:whole]) == wholly or (gaps and wholly)


def test_lists_of_completions_of_a_prompt() -> None:
    """Neither the completions before a query's own are listed, nor is the rest of it masked."""
    place, size = torch.arange(80), 16

    def counts(sees: Visibility, *, of_keys: bool = False) -> list[list[int]]:
        how = {"rows": 2 * size, "keys": size, "group": 2, "of_keys": of_keys}
        return Rule(sees).lists(**how)[1][0].tolist()

    sees = ints(place * 0, place + 1, place, place * 0 + 2 * size, place // size * size)
    assert counts(sees) == [[1, 0], [2, 1], [3, 2], [3, 2], [3, 2]]
    assert counts(sees, of_keys=True) == [[5, 4], [4, 3], [1, 0], [1, 0], [1, 0]]
    # A row that sees nothing has no say in what is left out; one without a gap leaves out nothing.
    _, end, *gap = sees.queries
    end[0, 50], gap[0][0, 50], gap[1][0, 50] = 0, 64, 0
    gap[0][0, 79] = gap[1][0, 79] = 0
    assert counts(sees) == [[1, 0], [2, 1], [3, 2], [3, 0], [5, 2]]
    assert counts(sees, of_keys=True) == [[5, 3], [4, 2], [2, 0], [2, 0], [1, 0]]


@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize("sees", [random_rule(0), with_gaps(random_rule(0), 0)], ids=["", "gaps"])
def test_a_device_lists_the_same_as_the_host(sees: Visibility, of_keys: bool) -> None:
    """A kernel reads the lists by their addresses, whatever the strides."""
    found = lists._Bounds.of(sees, rows=4, keys=7, group=2).meet(of_keys=of_keys)
    expected, counts = lists.listed(sees, rows=4, keys=7, group=2, of_keys=of_keys)
    listed, seen = lists._sorted(*found)
    assert torch.equal(seen, counts)
    assert listed.dtype == torch.int32
    assert listed.is_contiguous()
    assert expected.is_contiguous()
    within = torch.arange(listed.shape[2]) < counts[:, :, :1]
    assert torch.equal(listed[within], expected[within])


def test_nothing_is_found_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, lists and parts are found by who asks first."""
    calls: list[str] = []

    def counting(name: str) -> Any:
        function = getattr(rule_module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return counted

    for name in ("_narrowed", "listed"):
        monkeypatch.setattr(rule_module, name, counting(name))
    whole = Rule(random_rule(1))
    for _ in range(3):
        part = whole.part(slice(2, 9), slice(0, 20))
        part.blocks(queries_per_block=5, keys_per_block=7)
        part.lists(rows=4, keys=7, group=2, of_keys=False)
    assert calls == ["_narrowed", "listed"]
    assert whole.part() is whole
    assert torch.equal(part.visibility.mask(), whole.visibility.mask()[:, 2:9, :20])


def ints(*rows: Tensor) -> Visibility:
    return Visibility(*(row.int()[None] for row in rows))


INDEX = torch.arange(6)
ZERO = torch.zeros(6)
STRUCTURES = {
    Structure.ALL: ints(ZERO - 1, ZERO + 9, INDEX),
    Structure.CAUSAL: ints(ZERO, INDEX + 1, INDEX),
    Structure.PACKED: ints(torch.tensor([0, 0, 2, 2, 2, 5]), INDEX + 1, INDEX),
    Structure.STAIRCASE: ints(INDEX // 2, INDEX // 2 + 2, torch.arange(12) // 3),
    Structure.MIXED: ints(INDEX // 2, INDEX // 2 + 2, torch.tensor([0, 1, -1, 1, 2, 3])),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name: Structure) -> None:
    assert Rule(STRUCTURES[name]).structure is name


@pytest.mark.parametrize("name", STRUCTURES)
def test_one_sample_that_differs_makes_it_another_structure(name: Structure) -> None:
    """The structure is that of all samples."""
    if name is Structure.MIXED:
        return
    one = STRUCTURES[name]
    other = Visibility(one.q_start, one.q_end, one.kv_pos.flip(1) * 3)
    both = Visibility(
        *(torch.cat((getattr(one, f), getattr(other, f))) for f in ("q_start", "q_end", "kv_pos"))
    )
    assert Rule(both).structure is Structure.MIXED


@pytest.mark.parametrize("seed", range(6))
def test_structures_hold_what_they_say(seed: int) -> None:
    """Against the dense mask: all, or one run of keys a row that moves forward."""
    sees = random_rule(seed, batch=1)
    found, mask = Rule(sees).structure, sees.mask()[0]
    assert (found is Structure.ALL) == bool(mask.all())
    if found is Structure.STAIRCASE:
        changes = torch.nn.functional.pad(mask.int(), (1, 1)).diff(dim=1).abs().sum(dim=1)
        assert changes.max() <= 2


def test_what_the_host_does_not_know_has_no_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Rule(STRUCTURES[Structure.CAUSAL])
    monkeypatch.setattr(rule, "host", None)
    assert rule.structure is Structure.MIXED
