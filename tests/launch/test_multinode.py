"""Several nodes by the `deepspeed` launcher: each a network namespace, with ranks of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.data.media import chat, write_jsonl, write_video
from tests.launch.finetune_runs import ROOT, arguments, finetune, metrics, write_config
from tests.ranks import run_ranks

FOLDER = ROOT / "launch" / "multi-node"
NETLAB = ROOT / "ds_lvx" / "compare" / "netlab.sh"


def bash(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        ["bash", *map(str, words)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def _namespaces() -> None:
    """Skip where this machine or this user cannot make network namespaces."""
    name = f"try{uuid.uuid4().hex[:6]}"
    up = bash(NETLAB, "--name", name, "up", "1", "1gbit")
    if up.returncode != 0:
        pytest.skip(up.stderr.strip())
    bash(NETLAB, "--name", name, "down")


@pytest.mark.exhaustive
@pytest.mark.usefixtures("_namespaces")
def test_two_nodes_of_two_ranks_train_as_one_node_of_four(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", frames=6)
    data = write_jsonl(tmp_path / "train.jsonl", chat(("video", "a.mp4"), ("text", "What animal?")))
    options = {
        "model": "tiny",
        "data": data,
        "frames": 6,
        # One sample over all four ranks, so that queries cross between the nodes.
        "deepspeed_config": write_config(tmp_path / "ds.json", stage=2, sp_size=4),
        "learning_rate": 2e-3,  # small enough that each step of one sample lowers the loss
        "max_steps": 3,
    }
    nodes = bash(
        FOLDER / "local.sh",
        "launch/finetune.py",
        *arguments(**options, output_dir=tmp_path / "nodes"),
    )
    assert nodes.returncode == 0, nodes.stdout + nodes.stderr
    assert "nnodes=2, num_local_procs=2, node_rank=1" in nodes.stdout + nodes.stderr
    run_ranks(finetune, 4, *arguments(**options, output_dir=tmp_path / "node"))
    (several, _), (one, _) = metrics(tmp_path / "nodes"), metrics(tmp_path / "node")
    losses = [row["loss"] for row in one]
    assert len(losses) == 3
    assert losses[2] < losses[0]
    assert [row["loss"] for row in several] == pytest.approx(losses, abs=1e-6)
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert "lvxnodes" not in left.stdout


@pytest.mark.parametrize(
    ("variables", "words", "message"),
    [
        ({}, ["hostfile"], "got 1 arguments; expected a hostfile, a script"),
        ({}, ["none", "x.py"], "got 'none', which is no file; expected a hostfile"),
        ({"NODE_RANK": "one"}, ["hostfile", "x.py"], "NODE_RANK: got 'one'; expected this node's"),
        ({"NODE_RANK": "2"}, ["hostfile", "x.py"], "NODE_RANK: got 2; expected less than 2"),
        ({"NODE_RANK": "0"}, ["hostfile", "x.py"], "MASTER_ADDR: got nothing"),
    ],
)
def test_a_node_that_is_started_wrong_says_so(
    variables: dict[str, str], words: list[str], message: str, tmp_path: Path
) -> None:
    shutil.copy(FOLDER / "hostfile", tmp_path)
    given = [tmp_path / word if word == "hostfile" else word for word in words]
    done = bash(FOLDER / "node.sh", *given, **{"NODE_RANK": "", "MASTER_ADDR": "", **variables})
    assert done.returncode == 2
    assert message in done.stderr


def test_a_node_takes_the_interface_that_leads_to_node_0(tmp_path: Path) -> None:
    # In the launcher's place: what it is given, and what the ranks would find.
    launcher = tmp_path / "deepspeed"
    launcher.write_text('#!/bin/sh\necho "$GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME $*"\n')
    launcher.chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "NODE_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        **dict.fromkeys(("MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), ""),
    }
    done = bash(FOLDER / "node.sh", FOLDER / "hostfile", "x.py", "--a", "b c", **variables)
    assert done.stdout.split(maxsplit=2)[:2] == ["lo", "lo"], done.stderr
    assert done.stdout.split(maxsplit=2)[2] == (
        f"--hostfile {FOLDER / 'hostfile'} --no_ssh --node_rank 1 --master_addr 127.0.0.1 "
        "--master_port 29500 x.py --a b c\n"
    )
    named = bash(FOLDER / "node.sh", FOLDER / "hostfile", "x.py", INTERFACE="ib0", **variables)
    assert named.stdout.startswith("ib0 ib0 --hostfile")
