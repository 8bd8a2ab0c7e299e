"""Tasks of srun learn their ranks from Slurm's variables."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ds_lvx.distributed.slurm import read_slurm

TASK = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "7", "SLURM_NODEID": "1"}
NODES = {"SLURM_JOB_NODELIST": "gpu[08-09]", "SLURM_TASKS_PER_NODE": "4,3", "SLURM_JOB_ID": "41234"}


@pytest.fixture(autouse=True)
def _no_scontrol(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def test_a_task_gets_what_launchers_set() -> None:
    environ = {**TASK, **NODES}
    assert read_slurm(environ)
    assert {key: value for key, value in environ.items() if not key.startswith("SLURM")} == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "7",
        "LOCAL_SIZE": "3",
        "MASTER_ADDR": "gpu08",
        "MASTER_PORT": "21234",
    }


def test_a_task_of_pyxis_that_knows_only_its_rank_gets_the_rest() -> None:
    environ = {**TASK, **NODES, "RANK": "5", "LOCAL_RANK": "1"}
    assert read_slurm(environ)
    assert (environ["WORLD_SIZE"], environ["LOCAL_SIZE"]) == ("7", "3")
    assert (environ["RANK"], environ["MASTER_PORT"]) == ("5", "21234")


def test_what_the_user_names_stays() -> None:
    environ = {**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert read_slurm(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "29500")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {**TASK, **NODES, "RANK": "0"},
        {**TASK, **NODES, "RANK": "5", "WORLD_SIZE": "8"},
        {**TASK, **NODES, "SLURM_NTASKS": "1"},
        {**TASK, **NODES, "ENVIRONMENT": "BATCH"},
    ],
)
def test_others_are_left_alone(environ: dict[str, str]) -> None:
    before = dict(environ)
    assert not read_slurm(environ)
    assert environ == before


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n7", "n7"),
        ("a-1,a-2", "a-1"),
        ("gpu[1,3]", "gpu1"),
        ("gpu[003-010],x", "gpu003"),
        ("r[1-2]n", "r1n"),
        ("node[1-2],gpu[3-4]", "node1"),
        ("r[1-2]n[04,06-07]x,y", "r1n04x"),
    ],
)
def test_the_first_node_without_scontrol(nodes: str, first: str) -> None:
    environ = {**TASK, "SLURM_JOB_NODELIST": nodes}
    read_slurm(environ)
    assert environ["MASTER_ADDR"] == first


def test_a_step_may_leave_out_the_first_nodes() -> None:
    """As `srun --nodes 1 --nodelist n2 --ntasks 2` in a batch script of two nodes sets them."""
    batch = {"ENVIRONMENT": "BATCH", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "9"}
    step = {"SLURM_STEP_ID": "1", "SLURM_STEP_NODELIST": "n2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    environ = {**batch, **step, **TASK, "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "4(x2)"}
    assert read_slurm(environ)
    assert (environ["MASTER_ADDR"], environ["LOCAL_SIZE"]) == ("n2", "2")
    first = {**environ, "SLURM_STEP_ID": "0"}
    for name in ("RANK", "MASTER_PORT"):
        del first[name]
    read_slurm(first)
    assert first["MASTER_PORT"] == "20009" != environ["MASTER_PORT"]


def test_scontrol_is_asked_where_it_is(tmp_path: Path) -> None:
    script = tmp_path / "scontrol"
    script.write_text('#!/bin/sh\necho "$1-$2-of-$3"\necho second\n')
    script.chmod(0o755)
    assert os.environ["PATH"] == str(tmp_path)
    environ = {**TASK, "SLURM_JOB_NODELIST": "x[1-2]"}
    read_slurm(environ)
    assert environ["MASTER_ADDR"] == "show-hostnames-of-x[1-2]"


def test_nonsense_is_an_error() -> None:
    with pytest.raises(ValueError, match="SLURM_PROCID: got 'a'; expected a number"):
        read_slurm({**TASK, **NODES, "SLURM_PROCID": "a"})
    with pytest.raises(ValueError, match="SLURM_JOB_NODELIST: got ''"):
        read_slurm(dict(TASK))
