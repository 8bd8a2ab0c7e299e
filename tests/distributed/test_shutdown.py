"""Ending a run: which groups are let go of, and with what exit code scripts end."""

from __future__ import annotations

import ctypes
import gc
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch.distributed import ProcessGroup, destroy_process_group, distributed_c10d

import ds_lvx
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.shutdown import remember
from tests.models.mllama_case import ds_config, hard_batch, start_engine
from tests.ranks import FORKED, run_ranks

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
    held = sum(group() is not None for group in groups)
    model = ref(engine.module)
    del engine, out, kept
    gc.collect()
    assert model() is None, "something holds the model"
    return held


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


def end_by_themselves(stage: int | None) -> bool:
    """Whether groups stay open when a script has ended ``torch.distributed`` itself."""
    engine = None
    if stage is not None:
        config = ds_config(stage=stage, sp_size=2, cross={"method": "lvx"}, self_attn="ulysses")
        engine = start_engine(config)
    groups = ds_lvx.SequenceParallelGroups(2)
    groups.divide(1)
    Channel(groups.sp_group).barrier()
    destroy_process_group()
    gc.collect()
    ds_lvx.shutdown(engine)
    groups.close()
    return ds_lvx.SequenceParallelGroups.current() is not None


def test_a_script_may_have_ended_torch_distributed() -> None:
    for stage in (None, 3):
        assert run_ranks(end_by_themselves, 2, stage) == [False, False]


# ---- how scripts end


def place_of(rank: int, port: int) -> dict[str, str]:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return {**place, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}


def as_a_script(kind: str, place: dict[str, str], log: Path) -> None:
    """In a fork: the script in the place of ``__main__``, and then the end of the interpreter.

    A fork ends by `os._exit` otherwise, and what the script holds is never let go of.
    """
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(place)
    sys.argv = [str(SCRIPT), kind]
    code = 0
    try:
        exec(compile(SCRIPT.read_text(), SCRIPT, "exec"), vars(sys.modules["__main__"]))
    except BaseException:  # noqa: BLE001  (printed, as by the interpreter)
        traceback.print_exc()
        code = 1
    ctypes.pythonapi.Py_Exit(code)


def forked(kind: str, folder: Path, port: int) -> list[int | None]:
    ranks = [
        FORKED.Process(target=as_a_script, args=(kind, place_of(rank, port), folder / str(rank)))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return [rank.exitcode for rank in ranks]


def launched(kind: str, folder: Path, port: int) -> list[int | None]:
    ranks = []
    for rank in range(2):
        environment = {**os.environ, **place_of(rank, port), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(SCRIPT), kind]
        with (folder / str(rank)).open("w") as log:
            ranks.append(
                subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
            )
    return [rank.wait() for rank in ranks]


def end(way: Callable[..., list[int | None]], kind: str, folder: Path) -> list[tuple[Any, str]]:
    """Exit codes and output of both ranks of the script."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    codes = way(kind, folder, port)
    return [(code, (folder / str(rank)).read_text()) for rank, code in enumerate(codes)]


@pytest.mark.parametrize("way", [forked, pytest.param(launched, marks=pytest.mark.exhaustive)])
@pytest.mark.slow
def test_a_script_ends_with_0(way: Any, tmp_path: Path) -> None:
    ended = end(way, "training", tmp_path)
    assert [code for code, _ in ended] == [0, 0], ended


@pytest.mark.exhaustive
def test_a_script_ends_with_its_rank_s_error(tmp_path: Path) -> None:
    # What the other rank ends with, it does before it has heard of the failure.
    code, printed = end(launched, "failing", tmp_path)[1]
    assert code == 1, printed
    assert "KeyError" in printed
