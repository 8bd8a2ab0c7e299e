"""Which rectangles and causal squares cover a rule: the batches by name, and whatever comes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_lvx import Visibility
from ds_lvx.kernels import covering
from ds_lvx.kernels.cover import Cover, Order, Rectangle
from ds_lvx.kernels.covering import cover_of
from ds_lvx.kernels.rule import Rule
from tests.kernels.batches import BATCHES, calls_of, joined, own, prefix, rows, text


@pytest.mark.parametrize("name", BATCHES)
def test_the_calls_of_a_batch(name: str) -> None:
    found = cover_of(BATCHES[name].sees)
    assert (None if found is None else calls_of(found)) == BATCHES[name].calls


def counted(cover: Cover) -> Tensor:
    """How many rectangles hold each pair of a query and a key, ``[B, S, T]``."""
    batch, seqlen_q, seqlen_kv = cover.shape
    lie = [torch.arange(n).repeat(batch, 1) for n in (seqlen_q, seqlen_kv)]
    orders = (cover.queries, cover.keys)
    inner = [
        lies if order is None else order.places for lies, order in zip(lie, orders, strict=True)
    ]
    found = torch.zeros(cover.shape, dtype=torch.int32)
    for rectangles, (queries, keys) in ((cover.inner, inner), (cover.whole, lie)):
        for each in rectangles:
            square = torch.ones(each.size[1:], dtype=torch.int32)
            square = square.tril() if each.causal else square
            for sample in range(each.batch.start, each.batch.stop):
                places = queries[sample, each.queries, None], keys[sample, None, each.keys]
                found[sample][places] += square
    return found


def anything(seed: int) -> Visibility:
    """Samples of any kind: causal, staircases, ranges, holes, any order, queries that see all, and
    gaps."""
    torch.manual_seed(seed)

    def below(number: int) -> int:
        return int(torch.randint(number, ()))

    samples, queries = 1 + below(3), 1 + below(14)
    keys = queries if below(2) else 1 + below(40)

    def sample() -> tuple[Tensor, Tensor, Tensor]:
        index, start = torch.arange(queries), torch.zeros(queries, dtype=torch.int64)
        position = torch.arange(keys) // (1 + 2 * below(3))
        ends = (index + 1 + below(3), index // 3 + 1, torch.full((queries,), 9))
        kind = below(4)
        end = ends[kind] if kind < 3 else start + torch.randint(0, 5, (queries,))
        if below(2):
            start = torch.randint(-1, 4, (queries,)).sort().values
        if below(2):
            position[torch.rand(keys) < 0.3] = -1
        if below(3) == 0:
            position = position[torch.randperm(keys)]
        if below(3) == 0:
            which = torch.rand(queries) < 0.3
            start, end = start.masked_fill(which, -1), end.masked_fill(which, 10**6)
        if below(3) == 0:
            end = torch.where(torch.rand(queries) < 0.3, start, end)
        return start, end, position

    first = sample()
    found = rows(first, *(sample() if below(2) else first for _ in range(samples - 1)))
    return gapped(found) if below(3) == 0 else found


def gapped(sees: Visibility) -> Visibility:
    """With gaps, some of them empty: of any places, or all from one on, as behind a prompt."""
    start = torch.randint(-1, 9, sees.q_start.shape, dtype=torch.int32)
    end = start + torch.randint(-1, 6, start.shape, dtype=torch.int32)
    if torch.rand(()) < 0.5:
        start = start[:1, :1].expand_as(start)
        end = end.sort(dim=1).values
    return Visibility(*sees.queries, sees.kv_pos, start, end)


@pytest.mark.parametrize("decade", range(4))
def test_every_pair_that_sees_is_held_once(decade: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it costs, and whichever of the covers costs least."""
    for seed in range(50 * decade, 50 * decade + 50):
        monkeypatch.setattr(covering, "_CALL", (0, 5, 4096)[seed % 3])
        sees = anything(seed)
        cover = cover_of(sees)
        assert cover is not None
        assert torch.equal(counted(cover), sees.mask().int()), seed
        for one in cover.rectangles:
            assert min(one.size) > 0
            assert not one.causal or one.size[1] == one.size[2], "a diagonal that kernels dispute"


def test_what_is_sole_is_in_no_other_rectangle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covering, "_CALL", 5)
    seen = set()
    for seed in range(90):
        cover = cover_of(anything(seed))
        assert cover is not None
        pairs = counted(cover)
        if cover.queries is not None or cover.keys is not None:
            continue
        own_rows = [each.sole_queries for each in cover.rectangles]
        own_keys = [each.sole_keys for each in cover.rectangles]
        rows_in = torch.zeros(cover.shape[:2], dtype=torch.int32)
        keys_in = torch.zeros(cover.shape[::2], dtype=torch.int32)
        for each in cover.rectangles:
            rows_in[each.batch, each.queries] += 1
            keys_in[each.batch, each.keys] += 1
        for each, row, key in zip(cover.rectangles, own_rows, own_keys, strict=True):
            assert row == bool((rows_in[each.batch, each.queries] == 1).all())
            assert key == bool((keys_in[each.batch, each.keys] == 1).all())
        assert cover.merges == bool((rows_in > 1).any())
        assert cover.is_deep == bool((keys_in > 2).any())
        seen.add((cover.merges, cover.is_deep, bool(cover.whole), bool(pairs.any())))
    assert {(True, False, False, True), (False, True, False, True)} <= seen
    assert any(whole for _, _, whole, _ in seen)


def test_more_calls_are_allowed_where_each_has_much_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    many = of_frames(40)  # of one key, each seen by all later queries
    assert cover_of(many) is None
    monkeypatch.setattr(covering, "LARGE_CALL_SCORES", 4)
    found = cover_of(many)
    assert found is not None
    assert len(found.inner) == 40
    assert cover_of(of_frames(80)) is None


def of_frames(frames: int) -> Visibility:
    """Two queries a frame, which see the frames so far."""
    return rows((*prefix(2 * frames, frames), torch.arange(frames)))


def test_what_lies_one_after_the_other_is_one_launch() -> None:
    """Of samples that differ, too; not where a query is left over, or a key."""
    packed, frames = text(24, documents=3), rows((*own(24, 4), torch.arange(24) // 6))
    found = cover_of(joined(packed, text(24, documents=2)))
    assert found is not None
    assert found.sequences is not None
    assert found.calls == 1
    assert found.sequences.queries.tolist() == [0, 8, 16, 24, 36, 48]
    assert torch.equal(found.sequences.queries, found.sequences.keys)
    assert (found.sequences.longest, found.sequences.causal) == ((12, 12), True)
    mixed = cover_of(joined(packed, frames))
    assert mixed is not None
    assert mixed.sequences is None
    padded = cover_of(text(24, documents=3, padding=slice(23, 24)))
    assert padded is not None
    assert padded.sequences is None


def test_a_rule_knows_its_cover_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Visibility] = []
    found = Cover((1, 24, 24))
    monkeypatch.setattr("ds_lvx.kernels.rule.cover_of", lambda host: (calls.append(host), found)[1])
    rule = Rule(text(24))
    assert rule.cover is not None
    assert rule.cover is rule.cover
    assert rule.part(slice(0, 9)).cover is rule.part(slice(0, 9)).cover
    assert len(calls) == 2


def test_what_only_the_device_knows_has_no_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Rule(text(24))
    monkeypatch.setattr(rule, "host", None)
    assert rule.cover is None


@pytest.mark.parametrize("samples", [1, 2])
def test_an_order_takes_and_puts(samples: int) -> None:
    places = torch.tensor([[3, 0, 4], [1, 2, 0]])[:samples]
    order, tensor = Order(places), torch.randn(samples, 5, 2)
    taken = order.take(tensor)
    for sample in range(samples):
        assert torch.equal(taken[sample], tensor[sample, places[sample]])
    target = torch.zeros(samples, 2, 5, dtype=torch.bfloat16).transpose(1, 2)
    order.put(target, taken)
    assert torch.equal(order.take(target), taken.bfloat16())
    assert int(target.count_nonzero()) == 6 * samples


def test_where_all_see_all_there_is_one_rectangle() -> None:
    one = Cover.of_all(2, 3, 4)
    assert one.inner == (Rectangle(slice(0, 2), slice(0, 3), slice(0, 4)),)
    assert one.is_one_call
    assert Cover.of_all(2, 0, 4).rectangles == ()
