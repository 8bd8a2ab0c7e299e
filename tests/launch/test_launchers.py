"""The launchers `deepspeed`, `torchrun` and `srun` start the same job, to the same losses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.data.media import chat, write_image, write_jsonl
from tests.launch.finetune_runs import ROOT, SCRIPT, arguments, deepspeed_command, metrics

SLURM = ROOT / "launch" / "slurm"
PORT = str(29_950 + os.getpid() % 40)


def environment_of(**variables: str) -> dict[str, str]:
    """Of a shell in which no launcher runs, and no accelerator is."""
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    plain = {key: value for key, value in os.environ.items() if key not in launchers}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ours = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return {**plain, **ours, **variables}


def by_deepspeed(words: list[str]) -> None:
    command, _ = deepspeed_command(*words)
    finish([subprocess.Popen(command, env=environment_of(), cwd=ROOT)])


def by_torchrun(words: list[str]) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*run, "--master_port", PORT, str(SCRIPT), *words]
    finish([subprocess.Popen(command, env=environment_of(), cwd=ROOT)])


def by_srun(words: list[str]) -> None:
    """What srun does: two plain processes, which know Slurm's variables and no others."""
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
    }
    finish(
        [
            subprocess.Popen(
                [sys.executable, str(SCRIPT), *words],
                env=environment_of(**job, SLURM_PROCID=rank, SLURM_LOCALID=rank),
                cwd=ROOT,
            )
            for rank in ("0", "1")
        ]
    )


def finish(processes: list[subprocess.Popen[bytes]]) -> None:
    try:
        assert [process.wait(timeout=600) for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.exhaustive
def test_three_launchers_start_the_same_job(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", (40, 40))
    data = write_jsonl(tmp_path / "train.jsonl", chat(("image", "a.png"), ("text", "What?")))
    config = ROOT / "ds_configs" / "finetune-cpu.json"
    losses = []
    for launch in (by_deepspeed, by_torchrun, by_srun):
        out = tmp_path / launch.__name__
        given = {"model": "tiny", "data": data, "deepspeed_config": config, "output_dir": out}
        launch(list(arguments(**given, max_steps=2, learning_rate=1e-2)))
        losses.append([row["loss"] for row in metrics(out)[0]])
    assert losses[0] == losses[1] == losses[2]
    assert losses[0][1] < losses[0][0]


@pytest.mark.parametrize("name", ["finetune.sbatch", "finetune-pyxis.sbatch"])
def test_a_batch_script_hands_the_job_to_srun(name: str, tmp_path: Path) -> None:
    for tool, says in (("srun", 'printf "%s\\n" "$MASTER_ADDR" "$@"'), ("scontrol", "echo n1")):
        script = tmp_path / tool
        script.write_text(f"#!/bin/sh\n{says}\n")
        script.chmod(0o755)
    venv = Path(sys.executable).parent.parent
    variables = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "VENV": str(venv),
        "IMAGE": "image.sqsh",
        "MOUNTS": "/a:/a",
    }
    done = subprocess.run(
        ["bash", str(SLURM / name), "--data", "b c.jsonl"],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    address, *words = done.stdout.splitlines()
    assert words[:2] == ["--kill-on-bad-exit=1", "--gpu-bind=none"]
    assert words[-6:] == [
        "python",
        "launch/finetune.py",
        "--resume",
        "auto",
        "--data",
        "b c.jsonl",
    ]
    if "pyxis" in name:
        assert address == "n1"
        assert words[2:-6] == [
            *("--container-image", "image.sqsh", "--container-workdir", "/opt/ds_lvx"),
            *("--container-env", "OMP_NUM_THREADS", "--container-mount-home"),
            *("--container-mounts", "/a:/a"),
        ]
    done = subprocess.run(
        ["bash", str(SLURM / name), "--data", "b"],
        env={**variables, "SCRIPT": "launch/generate.py", "MASTER_ADDR": "10.0.0.1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("10.0.0.1\n")
    assert done.stdout.splitlines()[-4:] == ["python", "launch/generate.py", "--data", "b"]
    without = {key: value for key, value in variables.items() if key != "IMAGE"}
    without["VENV"] = str(tmp_path)
    done = subprocess.run(
        ["bash", str(SLURM / name)], env=without, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "names no image" in done.stderr or "name one: VENV=" in done.stderr


def test_the_image_is_made_of_what_the_repository_has() -> None:
    """Of files that exist, without caches, in the folder that Slurm's script enters."""
    text = (ROOT / "launch" / "docker" / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split()), line
    (folder,) = re.findall(r"^WORKDIR (\S+)$", text, re.MULTILINE)
    assert f"--container-workdir {folder} " in (SLURM / "finetune-pyxis.sbatch").read_text()
    (wanted,) = re.findall(r'-e "\.\[(.*)\]"', text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(wanted.split(",")) == set(project["optional-dependencies"]) - {"dev"}
    left_out = (ROOT / "launch" / "docker" / "Dockerfile.dockerignore").read_text().split()
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {name.rstrip("/") for name in ignored} <= {name.removeprefix("**/") for name in left_out}
