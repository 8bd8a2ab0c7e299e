"""Rows in order, whoever holds them: what Ulysses attends by is plain, and its results the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from ds_lvx.attention import order as order_module
from ds_lvx.attention.layout import Layout
from ds_lvx.attention.order import Places, Shards
from ds_lvx.attention.shape import Hybrid
from ds_lvx.attention.zigzag import dealt
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.rule import Structure
from ds_lvx.kernels.visibility import EVERYTHING, Visibility
from tests.attention.cases import Problem, assemble, largest_error, run_problems
from tests.kernels.batches import among, text
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def layout_of(sees: Visibility, held: list[Tensor]) -> Layout:
    """Of ranks that hold these rows."""
    rows, lengths = torch.cat(held), tuple(map(len, held))
    return Layout.of_batch(Channel(None), lengths, lengths, sees.part(rows, rows), device=CPU)


def window(length: int) -> Visibility:
    index = torch.arange(length, dtype=torch.int32)[None]
    return Visibility((index - 7).clamp(min=0), index + 1, index)


HELD = {
    "zigzag": dealt(61, 4),
    "frames among the text": among(5, of=8, length=61, ranks=4),
    "neighbours, ragged": list(torch.arange(61).split([20, 20, 1, 20])),
    "the last rank has less": list(torch.arange(61).split([16, 16, 16, 13])),
}


@pytest.mark.parametrize("name", HELD)
def test_what_a_kernel_gets_is_plain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal, packed or a window, as if nobody had cut it; found once a batch."""
    sorts: list[int] = []
    monkeypatch.setattr(
        order_module.InOrder, "of", counted(order_module.InOrder.of, sorts), raising=True
    )
    for sees, kind in (
        (text(61), Structure.CAUSAL),
        (text(60 + 1, documents=4), Structure.PACKED),
        (window(61), Structure.PACKED),
    ):
        layout = layout_of(sees, HELD[name])
        sorts.clear()
        for _ in range(3):
            rule = layout.arrival(1).rule
        assert sorts == [1]
        assert rule is not None
        assert rule.structure is kind
        assert torch.equal(rule.visibility.mask(), sees.mask())
        assert layout.arrival(1).keys is layout.arrival(1).queries


def counted(function, calls):  # type: ignore[no-untyped-def]
    def wrapper(*args):  # type: ignore[no-untyped-def]
        calls.append(1)
        return function(*args)

    return wrapper


def test_what_lies_in_order_is_left_as_it_lies() -> None:
    """Also where some see nothing, and some is seen by none."""
    keys = torch.arange(24, dtype=torch.int32)[None]
    start, end = torch.zeros_like(keys), keys + 1
    keys[0, :5] = EVERYTHING
    end[0, 7::5] = 0
    for sees in (text(24), text(24, documents=3), Visibility(start, end, keys)):
        layout = layout_of(sees, list(torch.arange(24).split(6)))
        arrival = layout.arrival(1)
        assert arrival.queries is arrival.keys is None
        assert arrival.rule is layout.rule(queries=None, keys=None)
    free = Layout(Channel(None), (4, 4), (6, 6), device=CPU).arrival(1)
    assert free.rule is free.queries is free.keys is None


def test_uneven_shards_of_which_all_see_all_need_no_rule() -> None:
    arrival = Layout(Channel(None), (4, 0, 3), (6, 6, 6), device=CPU).arrival(2)
    assert arrival.rule is None
    assert arrival.keys is None
    assert arrival.queries is not None
    table = torch.arange(3 * 2 * 4).view(3, 2, 4, 1, 1)
    taken = arrival.queries.take(table)[..., 0, 0]
    assert taken.tolist() == [[0, 1, 2, 3, 16, 17, 18], [4, 5, 6, 7, 20, 21, 22]]


def test_rows_go_back_to_where_they_came_from() -> None:
    """Each sample in its own order; where nothing was, anything may go."""
    shards = Shards((3, 5, 2), 5, drops=True)
    held = (~shards.padding()).nonzero()[:, 0]
    order = torch.stack([held[torch.randperm(10)] for _ in range(3)])
    places = Places.of(order, shards, CPU)
    arrived = torch.randn(3, 3, 5, 4, 2)
    rows = places.take(arrived)
    whole = arrived.transpose(0, 1).flatten(1, 2)
    assert torch.equal(rows, torch.stack([whole[b, order[b]] for b in range(3)]))
    table = torch.full((3, 3, 5, 6, 2), torch.nan)
    places.put(rows, table[:, :, :, 1:5])
    for rank, length in enumerate(shards.lengths):
        assert torch.equal(table[rank, :, :length, 1:5], arrived[rank, :, :length])
    assert table[:, :, :, [0, 5]].isnan().all()


def test_a_hybrids_subgroups_are_zigzag_again() -> None:
    """Of zigzag pieces 0 3 | 1 2, in halves, a subgroup holds 0 1 6 7 | 2 3 4 5 of eight."""
    layout = layout_of(text(64), dealt(64, 4))
    across, arrival = layout.across(Hybrid(2, "ring"), 1)
    assert arrival.queries is arrival.keys is not None
    own = across.rule(queries=0, keys=0)
    assert own is not None
    held = torch.cat((torch.arange(16), torch.arange(48, 64)))
    assert torch.equal(own.visibility.kv_pos[0], held.int())


@dataclass(frozen=True)
class Shuffled(Problem):
    """Causal rows in any order, another in each sample; some keys hidden, some queries blind."""

    def whole_visibility(self) -> Visibility:
        length = sum(self.q_lengths)
        generator = torch.Generator().manual_seed(3)
        rows = [torch.randperm(length, generator=generator) for _ in range(self.batch)]
        place = torch.stack(rows).int()
        end, keys = place + 1, place.clone()
        if self.visibility == "hidden":
            end[:, 4::5], keys[:, 2::7] = 0, EVERYTHING
        return Visibility(torch.zeros_like(place), end, keys)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_results_are_those_of_the_oracle(ranks: int) -> None:
    cases: list[tuple[Problem, str]] = []
    for lengths in ((11,) * ranks, (7, 2, 0, 13)[:ranks], (0, 19, 4, 1)[:ranks]):
        for visibility in ("causal", "hidden"):
            problem = Shuffled(lengths, lengths, visibility=visibility)
            cases.append((problem, "ulysses"))
            cases.append((replace(problem, heads=6, kv_heads=3, batch=1), "ulysses"))
            extra = {"ulysses": 2, "across": "ring", "schedule": "auto"}
            cases.append((replace(problem, lse_weight=0.5, extra=extra), "hybrid"))
    answers = run_ranks(run_problems, ranks, cases)
    for index, (problem, method) in enumerate(cases):
        errors = largest_error(assemble([a[index] for a in answers]), problem.oracle())
        assert max(errors.values()) < 1e-5, (method, problem, errors)
