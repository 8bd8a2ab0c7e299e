"""The script as users start it: by the `deepspeed` launcher, on a real video."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForImageTextToText

from ds_lvx.training import disk
from ds_lvx.training.model import Source, load_model
from ds_lvx.training.options import parse
from tests.data.media import BUNNY, chat, write_jsonl
from tests.launch.finetune_runs import (
    ROOT,
    arguments,
    deepspeed,
    deepspeed_command,
    metrics,
    one_process_loss,
    one_process_samples,
)
from tests.launch.forked_runs import Run

pytestmark = pytest.mark.slow
CONFIG = ROOT / "ds_configs" / "finetune-cpu.json"


@pytest.mark.exhaustive
def test_all_132_frames_of_a_real_video_over_two_ranks(tmp_path: Path) -> None:
    data = write_jsonl(
        tmp_path / "train.jsonl", chat(("video", str(BUNNY)), ("text", "What animal is it?"))
    )
    words = arguments(
        model="tiny",
        data=data,
        fps=25,
        deepspeed_config=CONFIG,
        output_dir=tmp_path / "out",
        learning_rate=1e-3,
        max_steps=1,
    )
    done = deepspeed(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 x 2 ranks" in done.stdout
    assert "tokens/s" in done.stderr
    training, _ = metrics(tmp_path / "out")

    # The same model and the whole video in one process, by transformers alone.
    options = parse(words)
    source = Source.of("tiny")
    saved = tmp_path / "out" / "model"
    samples = one_process_samples(saved, data, frames=132)
    assert samples[0]["pixel_values"].shape[1] == 132
    torch.set_num_threads(1)
    before = one_process_loss(load_model(options, {}, source), samples)
    after = one_process_loss(AutoModelForImageTextToText.from_pretrained(saved), samples)
    assert training[0]["loss"] == pytest.approx(before, abs=1e-5)
    assert after < before - 0.05


def test_an_error_ends_all_ranks_with_one_line_each(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", chat(("video", "none.mp4")))
    out = tmp_path / "out"
    words = arguments(model="tiny", data=data, deepspeed_config=CONFIG, output_dir=out)
    run = Run(words, ranks=2, folder=tmp_path)
    assert 0 not in run.end(launcher=False)
    for rank, log in enumerate(run.logs):
        said = log.read_text()
        assert re.search(rf"\[rank {rank}\] error: .*{data}:1: got no such file", said), said
        assert "Traceback" not in said


@pytest.mark.exhaustive
def test_a_launcher_that_is_ended_takes_its_ranks_along_and_they_save(tmp_path: Path) -> None:
    """`deepspeed` itself dies of a SIGTERM, and its ranks are nobody's children any more."""
    data = write_jsonl(tmp_path / "train.jsonl", chat(("text", "What?"), answer="A rabbit."))
    out = tmp_path / "out"
    words = arguments(
        model="tiny", data=data, deepspeed_config=CONFIG, output_dir=out, max_steps=100_000
    )
    command, environment = deepspeed_command(*words)
    shared = set(Path("/dev/shm").iterdir())
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log) as launcher,
    ):
        while launcher.poll() is None and not (out / "metrics.jsonl").exists():
            time.sleep(0.1)
        launcher.terminate()
    said = (tmp_path / "log").read_text()
    assert launcher.returncode == -signal.SIGTERM, said
    with FileLock(out / ".lock", timeout=300):  # until the ranks have ended
        said = (tmp_path / "log").read_text()
    assert "the launcher, process" in said, said
    (checkpoint,) = (out / "checkpoints").glob("step-*")
    assert disk.faults(checkpoint) == []
    assert not any("deepspeed" in p.name for p in set(Path("/dev/shm").iterdir()) - shared)
