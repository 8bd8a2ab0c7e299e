"""Groups, the mpu, and that nothing of a run poisons the next one."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

import ds_lvx
from bench_launches import made_up_ranks
from ds_lvx.distributed.channel import new_groups
from ds_lvx.distributed.groups import resolve, resolve_groups
from ds_lvx.distributed.start import init_distributed
from ds_lvx.distributed.subgroups import Divisions
from tests.ranks import RankError, run_ranks


def describe(size: int) -> dict[str, Any]:
    groups = ds_lvx.SequenceParallelGroups(size)
    inside = torch.ones(1) * torch.distributed.get_rank()
    torch.distributed.all_reduce(inside, group=groups.get_sequence_parallel_group())
    assert ds_lvx.SequenceParallelGroups.current() is groups
    assert resolve(None).size == size
    assert resolve_groups(None) is groups
    described = {
        "sp": (groups.sp_rank, groups.sp_size),
        "dp": (groups.dp_rank, groups.dp_size),
        "sum of the group's ranks": int(inside),
        "mpu sp": (
            groups.get_sequence_parallel_rank(),
            groups.get_sequence_parallel_world_size(),
        ),
        "mpu dp": (groups.get_data_parallel_rank(), groups.get_data_parallel_world_size()),
        "mpu dp x sp": (
            groups.get_sequence_data_parallel_rank(),
            groups.get_sequence_data_parallel_world_size(),
            torch.distributed.get_world_size(groups.get_sequence_data_parallel_group()),
        ),
        "mpu mp": (groups.get_model_parallel_rank(), groups.get_model_parallel_world_size()),
        "markers": (
            hasattr(groups, "initialize_sequence_parallel"),
            hasattr(groups, "get_data_parallel_group"),
        ),
    }
    groups.close()
    groups.close()
    assert ds_lvx.SequenceParallelGroups.current() is None
    return described


def divide() -> list[tuple[int, ...]]:
    """Sums of ranks over the subgroups and across them, of groups that come and go."""
    sums = []
    for size, parts in ((4, 2), (4, 2), (2, 2), (2, 1)):
        groups = ds_lvx.SequenceParallelGroups(size)
        groups.divide(parts)
        subgroups = Divisions.of(groups.channel, parts)
        rank = torch.ones(1) * torch.distributed.get_rank()
        sums.append(tuple(int(each.all_reduce(rank)) for each in subgroups))
        groups.close()
    return sums


@pytest.mark.slow
def test_subgroups_of_adjacent_ranks_and_across_them() -> None:
    answers = run_ranks(divide, 4)
    assert [answer[0] for answer in answers] == [(1, 2), (1, 4), (5, 2), (5, 4)]
    assert [answer[1:] for answer in answers] == [
        [(1, 2), (1, 0), (0, 1)],
        [(1, 4), (1, 1), (1, 1)],
        [(5, 2), (5, 2), (2, 5)],
        [(5, 4), (5, 3), (3, 5)],
    ]


@pytest.mark.slow
def test_adjacent_ranks_share_a_sequence() -> None:
    answers = run_ranks(describe, 4, 2)
    assert [a["sp"] for a in answers] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [a["dp"] for a in answers] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [a["sum of the group's ranks"] for a in answers] == [1, 1, 5, 5]
    for rank, answer in enumerate(answers):
        assert answer["mpu sp"] == answer["sp"]
        assert answer["mpu dp"] == answer["dp"]
        assert answer["mpu dp x sp"] == (rank, 4, 4)
        assert answer["mpu mp"] == (0, 1)
        assert answer["markers"] == (True, False)


class Options:
    """NCCL's, where PyTorch has none."""

    def __init__(self, *, is_high_priority_stream: bool) -> None:
        self.is_high_priority_stream = is_high_priority_stream


@pytest.mark.parametrize(("backend", "size"), [("nccl", 2), ("nccl", 1), ("gloo", 2)])
def test_on_nccl_two_urgent_groups_are_made(
    backend: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As rank 0 of four that are not there: the same groups in the same order on every rank."""
    made, ended = [], []
    new_group, destroy = torch.distributed.new_group, torch.distributed.destroy_process_group

    def record(ranks: list[int], *, pg_options: Any = None, **others: Any) -> Any:
        if not others.get("use_local_synchronization"):  # the group of this rank alone
            made.append((ranks, pg_options is not None and pg_options.is_high_priority_stream))
        return new_group(ranks, **others)

    monkeypatch.setattr(torch.distributed, "new_group", record)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda _: f"cuda:{backend}")
    nccl = SimpleNamespace(Options=Options)
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", nccl, raising=False)
    with made_up_ranks(4):
        groups = ds_lvx.SequenceParallelGroups(size)
        own, home = groups.channel.group, groups.channel.home
        monkeypatch.setattr(
            torch.distributed, "destroy_process_group", lambda g=None: (ended.append(g), destroy(g))
        )
        groups.close()
    two = backend == "nccl" and size > 1
    once = [(list(range(start, start + size)), backend == "nccl") for start in range(0, 4, size)]
    assert made == once * (1 + two)
    assert (home is not own) is two
    assert ended.count(home) == ended.count(own) == 1


def run_names() -> list[str]:
    """Names of groups that only their members make, on ranks that are in different numbers."""
    earlier = [torch.distributed.new_group([0]), *(torch.distributed.new_group() for _ in range(2))]
    names = []
    for _ in range(2):
        groups = ds_lvx.SequenceParallelGroups(2)
        inside = Divisions.of(groups.channel, 2).inside
        assert inside.agree({"rank": inside.rank}) == [{"rank": 0}, {"rank": 1}]
        assert inside.group is not None
        names.append(inside.group.group_name)
        groups.close()
    still_open = ds_lvx.SequenceParallelGroups(2)
    for group in earlier[1:]:  # as many groups as before: torch's own names would come again
        torch.distributed.destroy_process_group(group)
    ds_lvx.SequenceParallelGroups(2).close()
    still_open.close()
    return names


def test_members_name_their_group_alike_and_never_as_one_before() -> None:
    one, other = run_ranks(run_names, 2)
    assert one == other
    assert len(set(one)) == 2


def make_and_look() -> bool:
    """Whether the first rank, which is late, has its groups when this one has them."""
    store = torch.distributed.distributed_c10d._get_default_store()

    def late(ranks_by_group: Any) -> Any:
        made = new_groups(ranks_by_group)
        if torch.distributed.get_rank() == 0:
            time.sleep(0.5)
            store.set("made", "")
        return made

    with mock.patch("ds_lvx.distributed.groups.new_groups", late):
        groups = ds_lvx.SequenceParallelGroups(2)
    found: bool = store.check(["made"])
    groups.close()
    return found


def test_no_rank_has_groups_before_all_have() -> None:
    """Else one that closes them at once breaks connections that another still makes."""
    assert run_ranks(make_and_look, 2) == [True, True]


def make_groups(size: Any) -> None:
    ds_lvx.SequenceParallelGroups(size)


@pytest.mark.parametrize("size", [2, 0, -1, True, 1.5])
def test_a_size_that_does_not_divide_the_world(size: Any) -> None:
    with pytest.raises(RankError, match=r"got .* for a world of 3 ranks; expected one of \[1, 3\]"):
        run_ranks(make_groups, 3, size)


def test_without_distributed() -> None:
    with pytest.raises(RuntimeError, match="init_distributed"):
        ds_lvx.SequenceParallelGroups(1)
    with pytest.raises(RuntimeError, match="no sequence-parallel groups"):
        resolve_groups(None)
    assert resolve(None).size == 1


def train_twice() -> list[list[float]]:
    """Two engines in one process: ours with sequence parallelism, then DeepSpeed's own alone."""
    init_distributed(verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0,
    }
    weights = []
    for size in (2, None, 1):
        torch.manual_seed(0)
        model = nn.Linear(2, 1, bias=False)
        groups = None if size is None else ds_lvx.SequenceParallelGroups(size)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            config=config,
            mpu=groups,
        )
        x = torch.full((1, 2), float(torch.distributed.get_rank() + 1))
        engine.backward(engine(x).sum())
        engine.step()
        weights.append(model.weight.detach().flatten().tolist())
        engine.destroy()
        if groups is not None:
            groups.close()
        assert deepspeed_groups.mpu is None
    return weights


def test_a_second_engine_is_not_poisoned() -> None:
    """Sequence parallel: gradients add up (1 + 2). Plain data parallel: they are averaged."""
    for first, second, third in run_ranks(train_twice, 2):
        drop = [a - b for a, b in zip(second, first, strict=True)]
        assert drop == pytest.approx([1.5, 1.5])
        assert second == pytest.approx(third)


def clipped_steps() -> dict[str, float]:
    """How far a step of SGD goes with gradients of norm 4 (2 from each rank) clipped to 0.5."""
    init_distributed(verbose=False)
    lengths = {}
    for stage, bf16 in ((0, False), (1, False), (2, False), (3, False), (0, True)):
        model = nn.Linear(4, 1, bias=False)
        before = torch.zeros(1, 4)
        model.weight.data.copy_(before)
        groups = ds_lvx.SequenceParallelGroups(2)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": 0.5,
                "bf16": {"enabled": bf16},
            },
            mpu=groups,
        )
        x = torch.ones(1, 4, dtype=torch.bfloat16 if bf16 else torch.float32)
        engine.backward(engine(x).sum() * (2 if stage == 3 else 1))
        engine.step()
        parameter = next(engine.module.parameters())
        weight = safe_get_full_fp32_param(parameter)
        weight = parameter.detach() if weight is None else weight  # stage 0 in fp32
        lengths[f"{stage} {bf16}"] = float(weight.float().norm())
        engine.destroy()
        groups.close()
    return lengths


def test_clipping_uses_the_norm_of_one_process() -> None:
    """DeepSpeed would sum the norm over the world if the model-parallel group were None."""
    for lengths in run_ranks(clipped_steps, 2):
        assert lengths == pytest.approx(dict.fromkeys(lengths, 0.5), rel=5e-3)


def different_sizes() -> None:
    ds_lvx.SequenceParallelGroups(1 + torch.distributed.get_rank())


def test_ranks_must_ask_for_the_same_size() -> None:
    with pytest.raises(RankError, match="disagree on sequence_parallel_size: got 1 on rank 0"):
        run_ranks(different_sizes, 2)
