"""The quickstart, with few steps."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from digits.data import IMAGE_TOKEN, load, training_batches
from tests.launch.finetune_runs import ROOT, deepspeed_command
from tests.launch.forked_runs import Run

SCRIPT = ROOT / "launch" / "quickstart.py"
STEPS = 10


def script_main(words: Sequence[str]) -> int:
    """The script's own main, with its folder on the path as where it is started."""
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sys.argv = [str(SCRIPT), *words]
    script.main()
    return 0


def forked(words: Sequence[str], folder: Path) -> str:
    run = Run(words, ranks=2, folder=folder, main=script_main)
    assert run.end() == [0, 0], run.output()
    return run.output()


def launched(words: Sequence[str], folder: Path) -> str:
    command, environment = deepspeed_command(*words, script=SCRIPT, DS_ACCELERATOR="cpu")
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(
    scope="module", params=[forked, pytest.param(launched, marks=pytest.mark.exhaustive)]
)
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The folder that a short run wrote, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    words = ["--output_dir", str(folder), "--steps", str(STEPS)]
    return folder, request.param(words, tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def metrics(finished: tuple[Path, str]) -> dict[str, Any]:
    return json.loads((finished[0] / "metrics.json").read_text())


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_learns(metrics: dict[str, Any]) -> None:
    assert metrics["sequence_parallel_size"] == 2
    assert len(metrics["losses"]) == len(metrics["losses_one_process"]) == STEPS
    assert metrics["loss_first"] == metrics["losses"][0]
    assert metrics["loss_last"] == metrics["losses"][-1] < metrics["loss_first"] - 0.2
    assert metrics["max_loss_difference_to_one_process"] < 2e-5
    # Far above the 10% of guessing already, and one digit of 360 may fall on the other side.
    assert metrics["heldout_accuracy"] > 0.15
    assert abs(metrics["heldout_accuracy"] - metrics["heldout_accuracy_one_process"]) < 0.005


@pytest.mark.slow
def test_bytes_of_the_methods(metrics: dict[str, Any]) -> None:
    # 2 layers; 12 samples of 16 text tokens and 8 frames of 17 visual tokens, over 2 ranks;
    # 4 heads, 2 of K and V, of 16 numbers in fp32; 8 bytes of visibility a query.
    queries, keys = 12 * 16 // 2, 12 * 8 * 17 // 2
    heads, kv_heads, head_dim, size = 4, 2, 16, 4
    forward = heads * (2 * head_dim * size + 4) + 8
    backward = heads * (3 * head_dim * size + 8) + 8
    sent = metrics["bytes_sent"]
    assert sent["lvx"] == pytest.approx(2 * queries * (forward + backward), rel=0.02)
    # K and V forward and again backward, and their gradients.
    assert sent["ring"] >= 2 * keys * kv_heads * head_dim * size * 2 * 3
    assert sent["lvx"] < sent["ulysses"] < sent["ring"]


@pytest.mark.slow
def test_picture_and_table(finished: tuple[Path, str], metrics: dict[str, Any]) -> None:
    folder, printed = finished
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert f"{metrics['heldout_accuracy']:.1%}" in printed
    assert f"{metrics['bytes_sent']['lvx']:,} B" in printed
    assert "lvx" in printed.partition("recompute_kv")[2].partition("step")[0]


def test_a_digit_sees_its_own_frame_only() -> None:
    training, _ = load()
    batch = next(training_batches(training, steps=1, batch_size=2, frames=3, seed=0))
    assert batch["input_ids"][:, 0::2].eq(IMAGE_TOKEN).all()
    own_frame = torch.eye(3, dtype=torch.long).repeat_interleave(2, dim=0)
    for mask in batch["cross_attention_mask"][..., 0]:
        torch.testing.assert_close(mask, own_frame)
    assert batch["labels"][0].tolist() == [
        token for digit in batch["input_ids"][0, 1::2].tolist() for token in (-100, digit)
    ]


def test_no_digit_held_out_is_trained_on() -> None:
    training, held_out = load()
    assert (len(training), len(held_out)) == (1437, 360)
    known = {frame.numpy().tobytes() for frame in training.frames}
    assert not any(frame.numpy().tobytes() in known for frame in held_out.frames)


@pytest.mark.slow
def test_the_command_starts_two_ranks_and_hands_arguments_on(tmp_path: Path) -> None:
    # The environment and the launcher are replaced; the rest is the script itself.
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "quickstart.sh", tmp_path / "launch")
    (tmp_path / "launch" / "env.sh").write_text(
        f'python() {{ "{sys.executable}" "$@"; }}\nPATH="$PWD:$PATH"\n'
    )
    launcher = tmp_path / "deepspeed"
    launcher.write_text('#!/bin/sh\necho "$DS_ACCELERATOR" "$@"\n')
    launcher.chmod(0o755)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("DS_ACCELERATOR", None)
    done = subprocess.run(
        ["bash", str(tmp_path / "launch" / "quickstart.sh"), "--steps", "7"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.split()
    assert words[0] == "cpu"
    assert words[words.index("--num_gpus") + 1] == "2"
    assert words[-4:] == ["--deepspeed_config", "ds_configs/quickstart.json", "--steps", "7"]
