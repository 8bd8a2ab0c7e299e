"""Channels: bundles of any lengths, records, and errors that reach every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ds_lvx
from ds_lvx.distributed import channel as channels
from ds_lvx.distributed.agreement import require_same
from ds_lvx.distributed.bundles import Bundle, Spec, pack_rows, unpack_rows
from ds_lvx.distributed.channel import Channel
from tests.ranks import RankError, run_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.bool, torch.float64)


def bundle_of(rank: int, salt: int = 0) -> Bundle:
    """Five odd tensors whose lengths depend on the rank."""
    generator = torch.Generator().manual_seed(100 * salt + rank)
    return [
        torch.randint(0, 2, (2, rank + index % 2, 3), generator=generator).to(dtype)
        for index, dtype in enumerate(DTYPES)
    ]


def specs_of(rank: int) -> list[Spec]:
    return [Spec.of(tensor) for tensor in bundle_of(rank)]


def same(one: Bundle, other: Bundle) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def test_each_tensor_of_a_message_begins_at_a_multiple_of_16_bytes() -> None:
    tensors, dims = rows_of([0], [3]), (0, 1, 2)
    packed = pack_rows(tensors, dims)
    assert packed.shape[1] % 16 == 0
    specs = [Spec.of(tensor) for tensor in tensors]
    views = unpack_rows(packed, specs, dims)
    assert same(views, tensors)
    assert all((view.data_ptr() - packed.data_ptr()) % 16 == 0 for view in views)
    one = torch.arange(24.0).view(1, 6, 2, 2)
    assert pack_rows([one], [1]).data_ptr() == one.data_ptr()  # it lies as it travels
    assert pack_rows([one[:, :, :1]], [1]).data_ptr() != one.data_ptr()


def run_transfers() -> None:
    channel = Channel.world()
    rank, size = channel.rank, channel.size
    for hops in (h for h in (1, -1, 2) if h % size):
        source = (rank - hops) % size
        first = channel.shift(bundle_of(rank), specs_of(source), hops=hops)
        second = channel.shift(bundle_of(rank, salt=9), specs_of(source), hops=hops)
        assert same(first.wait(), bundle_of(source)), f"shift by {hops}"
        assert same(second.wait(), bundle_of(source, salt=9)), f"second shift by {hops}"

    value = torch.tensor([1.0, rank])
    total = channel.all_reduce(value)
    assert total.tolist() == [size, sum(range(size))], "all_reduce"
    assert value.tolist() == [1.0, rank], "all_reduce changed its input"


def rows_of(ranks: list[int], lengths: list[int], salt: int = 0) -> Bundle:
    """Tensors with the rows of some ranks, in their first, second and third dimension."""
    generator = torch.Generator().manual_seed(salt)
    whole = [
        torch.randint(0, 100, (sum(lengths), 3), generator=generator).to(torch.int32),
        torch.rand(2, sum(lengths), 5, generator=generator).bfloat16(),
        torch.rand(2, 1, sum(lengths), 3, generator=generator, dtype=torch.float64),
    ]
    pieces = [tensor.split(lengths, dim) for dim, tensor in enumerate(whole)]
    return [torch.cat([p[rank] for rank in ranks], dim) for dim, p in enumerate(pieces)]


def run_row_transfers() -> None:
    channel = Channel.world()
    everyone = list(range(channel.size))
    for lengths in ([2] * channel.size, [(3 * rank) % 4 for rank in everyone]):
        dims = (0, 1, 2)
        gathered = channel.gather_rows(rows_of([channel.rank], lengths), dims, lengths)
        with ds_lvx.traffic() as counted:
            exchanged = channel.exchange_rows(
                rows_of(everyone, lengths, salt=channel.rank), dims, lengths
            )
        assert same(gathered.wait(), rows_of(everyone, lengths)), "gather_rows"
        arrived = exchanged.wait()
        for sender in everyone:
            parts = [tensor[sender] for tensor in arrived]
            assert same(parts, rows_of([channel.rank], lengths, salt=sender)), "exchange_rows"
        row = 16 + 32 + 48  # bytes of a row, each tensor's padded to a multiple of 16
        assert counted.bytes_sent == row * (sum(lengths) - lengths[channel.rank])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_transfers_by_rows(ranks: int) -> None:
    if ranks > 1:
        run_ranks(run_row_transfers, ranks)
        return
    channel, mine = Channel(None), rows_of([0], [3])
    assert same(channel.gather_rows(mine, (0, 1, 2), [3]).wait(), mine)
    arrived = channel.exchange_rows(mine, (0, 1, 2), [3]).wait()
    assert same([tensor[0] for tensor in arrived], mine)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_transfers(ranks: int) -> None:
    run_ranks(run_transfers, ranks)


def run_gathers_of_one_length() -> list[int]:
    """Messages as long as the longest, as on an accelerator; bytes that this rank has sent."""
    channel, dims, sent = Channel.world(), (0, 1, 2), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channels, "go_alike", lambda mine, sizes: True)
        for lengths in ([3, 3, 2], [4, 0, 1]):
            with ds_lvx.traffic() as counted:
                arriving = channel.gather_rows(rows_of([channel.rank], lengths), dims, lengths)
            assert same(arriving.wait(), rows_of([0, 1, 2], lengths)), lengths
            odd = [torch.full((1, length, 3), length, dtype=torch.uint8) for length in lengths]
            (arrived,) = channel.gather_rows(
                odd[channel.rank : channel.rank + 1], [1], lengths
            ).wait()
            assert torch.equal(arrived, torch.cat(odd, dim=1)), lengths
            sent.append(counted.bytes_sent)
    return sent


def test_unequal_rows_go_by_a_plain_all_gather() -> None:
    row = 16 + 32 + 48
    assert run_ranks(run_gathers_of_one_length, 3) == [[2 * row * 3, 2 * row * 4]] * 3
    elsewhere = torch.empty(1, device="meta")
    for sizes, alike in (([5, 5], True), ([9, 9, 8, 8], True), ([9, 9, 5], False), ([4, 0], False)):
        assert channels.go_alike(elsewhere, sizes) is alike
        assert not channels.go_alike(torch.empty(1), sizes)


def run_on_two_groups() -> list[str]:
    """Which group is asked for what; the results are right on both."""
    out, home = (torch.distributed.new_group([0, 1]) for _ in range(2))
    channel, used = Channel(out, home=home), []
    name = {id(out): "out", id(home): "home"}
    whole_all_to_all, whole_swap = torch.distributed.all_to_all_single, channels._swap

    def all_to_all(*args: Any, group: Any, **options: Any) -> Any:
        used.append(name[id(group)])
        return whole_all_to_all(*args, group=group, **options)

    def swap(*args: Any, group: Any) -> Any:
        used.append(name[id(group)])
        return whole_swap(*args, group=group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_to_all_single", all_to_all)
        patch.setattr(channels, "_swap", swap)
        mine, like = torch.full((2,), channel.rank), [Spec((2,), torch.int64)]
        transfers: list[Any] = [
            channel.gather_rows([mine], [0], (2, 2)),
            channel.exchange_rows([torch.tensor([0, 1])], [0], (1, 1)),
            channel.shift([mine], like, hops=1),
            channel.shift([mine], like, hops=-1),
        ]
        found = [transfer.wait()[0].flatten().tolist() for transfer in transfers]
    other = [1 - channel.rank] * 2
    assert found == [[0, 0, 1, 1], [channel.rank] * 2, other, other]
    return used


def test_what_goes_home_has_a_group_of_its_own() -> None:
    both = ["out", "home", "out", "home"]
    assert run_ranks(run_on_two_groups, 2) == [both, both]


def run_agreements() -> list[Any]:
    channel = Channel.world()
    small = channel.agree({"rank": channel.rank, "nested": [1, {"x": None}]})
    long = channel.agree({"text": "é" * (5000 if channel.rank == 1 else 3)})
    channel.agree_on({"size": channel.size}, what="test")
    channel.barrier()
    with ds_lvx.traffic() as counted:
        channel.agree({})
    assert counted.bytes_sent == 0
    assert counted.control.bytes_sent > 0
    return [small, [len(record["text"]) for record in long]]


def test_records_of_any_length_reach_every_rank() -> None:
    for small, lengths in run_ranks(run_agreements, 3):
        assert small == [{"rank": rank, "nested": [1, {"x": None}]} for rank in range(3)]
        assert lengths == [3, 5000, 3]


def run_errors(kinds: dict[int, str]) -> None:
    channel = Channel.world()
    kind = kinds.get(channel.rank)
    error = {
        "value": ValueError("too long; shorten it"),
        "missing": NotImplementedError("no such thing"),
        "file": FileNotFoundError("a.mp4"),
    }.get(kind or "")
    channel.agree({"flag": torch.tensor(True)} if kind == "no JSON" else {}, error)


@pytest.mark.parametrize(
    ("kinds", "text"),
    [
        ({1: "value"}, "ValueError: rank 1: too long; shorten it"),
        ({0: "missing", 2: "missing"}, "NotImplementedError: ranks 0, 2: no such thing"),
        ({0: "value", 1: "value", 2: "value"}, "ValueError: all ranks: too long"),
        ({0: "value", 1: "missing"}, "rank 0: too long; shorten it; rank 1: no such thing"),
        ({2: "file"}, "ValueError: rank 2: a.mp4"),
        ({1: "no JSON"}, "ValueError: rank 1: Object of type Tensor is not JSON serializable"),
    ],
)
def test_an_error_of_one_is_an_error_of_all(kinds: dict[int, str], text: str) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(run_errors, 3, kinds)
    assert set(caught.value.errors) == {0, 1, 2}
    assert all(text in error for error in caught.value.errors.values())


def test_what_must_be_the_same() -> None:
    records = [{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1, "b": 2}]
    require_same(records, ["a"], what="call")
    with pytest.raises(ValueError, match=r"call: .*b: got 2 on ranks 0, 2, 3 on rank 1"):
        require_same(records, ["a", "b"], what="call")


def test_counting_nests_and_ends() -> None:
    from ds_lvx.distributed.traffic import count

    with ds_lvx.traffic() as outer:
        count("all_gather", 5)
        with ds_lvx.traffic() as inner:
            count("all_gather", 7)
    count("all_gather", 100)
    assert (outer.bytes_sent, outer.calls, inner.bytes_sent, inner.calls) == (12, 2, 7, 1)


def run_in_a_subgroup() -> list[float] | None:
    """A group of ranks 1 and 3 of four: local and global ranks differ."""
    group = torch.distributed.new_group([1, 3])
    if torch.distributed.get_rank() in (0, 2):
        try:
            Channel(group)
        except ValueError as error:
            assert "does not belong to" in str(error)  # noqa: PT017  (runs on a rank)
        return None
    channel = Channel(group)
    theirs = channel.shift([torch.full((2,), float(channel.rank))], [Spec((2,), torch.float32)])
    return theirs.wait()[0].tolist()


@pytest.mark.slow
def test_groups_other_than_the_world() -> None:
    assert run_ranks(run_in_a_subgroup, 4) == [None, [1.0, 1.0], None, [0.0, 0.0]]
