"""Ending a run: which groups are let go of, and with what exit code scripts end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch.distributed import ProcessGroup, distributed_c10d

import ds_lvx
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.shutdown import remember
from tests.models.mllama_case import ds_config, hard_batch, start_engine
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("ending_script.py")


# ---- which groups


def groups_left(stage: int, *, given: bool, bf16: bool = False) -> int:
    """How many process groups outlive a shutdown when the script holds all that it made."""
    config = ds_config(stage=stage, sp_size=2, cross={"method": "lvx"}, self_attn="ulysses")
    engine = start_engine({**config, "bf16": {"enabled": bf16}})
    out = engine(**ds_lvx.shard_batch(hard_batch(), model=engine.module))
    engine.backward(out.loss)
    engine.step()
    kept = engine, engine.optimizer, out, list(engine.module.parameters())
    groups = [ref(group) for group in distributed_c10d._world.pg_map]
    assert len(groups) == 3, "the world, the sequence-parallel group and this rank alone"
    engine.destroy()
    ds_lvx.shutdown(engine if given else None)
    assert all(kept)
    return sum(group() is not None for group in groups)


@pytest.mark.parametrize(
    ("stage", "given", "bf16"),
    [
        pytest.param(3, True, False, marks=pytest.mark.exhaustive),
        pytest.param(3, False, True, marks=pytest.mark.slow),
        pytest.param(1, True, False, marks=pytest.mark.exhaustive),
        (0, True, True),
    ],
)
def test_an_engine_that_is_held_holds_no_group(stage: int, given: bool, bf16: bool) -> None:
    assert run_ranks(groups_left, 2, stage, given=given, bf16=bf16) == [0, 0]


class Theirs:
    """Something of the user's that holds groups."""

    def __init__(self, group: Any) -> None:
        self.group = self.dp_process_group = group
        self.by_name = {"group": group}
        self.groups = [group]


def hold_a_group() -> None:
    groups = ds_lvx.SequenceParallelGroups(2)
    group = groups.sp_group
    theirs = Theirs(group)
    module = torch.nn.Linear(1, 1)
    module.seq_parallel_group = group  # type: ignore[assignment]
    remember(module)  # as a model that is to be an engine's
    Channel(group).barrier()
    ds_lvx.shutdown()
    assert isinstance(group, ProcessGroup)
    assert theirs.group is theirs.dp_process_group is module.seq_parallel_group is group
    assert theirs.by_name == {"group": group}
    assert theirs.groups == [group]


def test_what_users_hold_stays() -> None:
    run_ranks(hold_a_group, 2)


# ---- how scripts end


def end(kind: str) -> list[tuple[int, str]]:
    """Exit codes and output of both ranks of the script."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    place |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), kind],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    printed = [rank.communicate()[0] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, printed, strict=True)]


@pytest.mark.slow
def test_a_script_ends_with_0() -> None:
    ended = end("training")
    assert [code for code, _ in ended] == [0, 0], ended


@pytest.mark.exhaustive
def test_a_script_ends_with_its_rank_s_error() -> None:
    # What the other rank ends with, it does before it has heard of the failure.
    code, printed = end("failing")[1]
    assert code == 1, printed
    assert "KeyError" in printed
