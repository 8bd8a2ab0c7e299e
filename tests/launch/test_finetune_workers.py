"""Data workers of a run, and what its ranks say to each other about the batches."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest

from ds_lvx.data.order import SampleOrder
from ds_lvx.distributed.channel import Channel
from ds_lvx.training.loop import Trainer
from tests.data.media import chat, write_image, write_jsonl
from tests.launch.finetune_runs import arguments, finetune, metrics, write_config
from tests.launch.forked_runs import Run
from tests.ranks import RankError, run_ranks

STEPS = 12


def _words(folder: Path, name: str, config: str, **options: Any) -> list[str]:
    given = {
        "model": "tiny",
        "data": folder / "train.jsonl",
        "deepspeed_config": config,
        "output_dir": folder / name,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        **options,
    }
    return list(arguments(**given))


def _write(folder: Path, *, count: int = 6) -> None:
    write_image(folder / "a.png")
    questions = [chat(("image", "a.png"), ("text", f"{i}?"), answer=f"{i}.") for i in range(count)]
    write_jsonl(folder / "train.jsonl", *questions)


def _losses(out: Path) -> list[float]:
    training, _ = metrics(out)
    return [row["loss"] for row in training]


def agreements_of_each_step(*words: str) -> list[list[int]]:
    """On a rank: how many ranks took part in the agreements of each step."""
    sizes: list[int] = []
    steps: list[list[int]] = []
    agree, take_step = Channel.agree, Trainer._take_step

    def noted(channel: Channel, *given: Any) -> Any:
        sizes.append(channel.size)
        return agree(channel, *given)

    def stepping(trainer: Trainer) -> Any:
        sizes.clear()
        loss = take_step(trainer)
        steps.append(sizes.copy())
        return loss

    with patch.object(Channel, "agree", noted), patch.object(Trainer, "_take_step", stepping):
        finetune(*words)
    return steps


@pytest.mark.slow
def test_a_forward_agrees_once_and_others_than_the_group_wait_at_the_ends_alone(
    tmp_path: Path,
) -> None:
    _write(tmp_path)
    for sp_size, expected in ((2, [2, 2, 2]), (1, [2, 1, 2])):
        path = tmp_path / f"{sp_size}.json"
        config = write_config(path, stage=2, sp_size=sp_size, accumulation=3)
        words = _words(tmp_path, f"sp-{sp_size}", config, max_steps=2)
        # The first forward of a run is followed by what each rank of the group has held of it.
        first = [expected[0], sp_size, *expected[1:]]
        assert run_ranks(agreements_of_each_step, 2, *words) == [[first, expected]] * 2


def finetune_without_room(*words: str) -> None:
    """On a rank: a run whose model cannot be written."""
    with patch("ds_lvx.training.loop.save_pretrained", side_effect=ValueError("no room")):
        finetune(*words)


@pytest.mark.slow
def test_what_one_replica_finds_in_the_middle_of_a_step_ends_both(tmp_path: Path) -> None:
    """The steps before it are saved, and so is the last one of a model that cannot be written."""
    _write(tmp_path, count=12)
    config = write_config(tmp_path / "ds.json", stage=2, sp_size=1, accumulation=3)
    bad = SampleOrder(12, 0).sample(8)  # of the first replica's second forward in the second step
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    write_image(tmp_path / "bad.png")
    lines[bad] = chat(("image", "bad.png"), ("text", "what?"))
    write_jsonl(tmp_path / "train.jsonl", *lines)
    whole = (tmp_path / "bad.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(whole[: len(whole) * 2 // 3])
    words = _words(tmp_path, "out", config, max_steps=2)
    with pytest.raises(RankError) as caught:
        run_ranks(finetune, 2, *words)
    for text in caught.value.errors.values():
        assert f"rank 0: {tmp_path}/train.jsonl:{bad + 1}: " in text
    assert len(_losses(tmp_path / "out")) == 1
    (tmp_path / "bad.png").write_bytes(whole)
    with pytest.raises(RankError, match="no room"):
        run_ranks(finetune_without_room, 2, *words, "--resume")
    assert len(_losses(tmp_path / "out")) == 2
    states = sorted((tmp_path / "out" / "checkpoints").glob("step-*/run.json"))
    assert [json.loads(state.read_text())["samples_seen"] for state in states] == [6, 12]


def _wait_for_a_step(run: Run, out: Path, step: int) -> None:
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert all(process.is_alive() for process in run.processes), run.output()
        time.sleep(0.01)


@pytest.mark.exhaustive
def test_a_run_whose_worker_is_struck_ends_and_resumes_as_one_without(tmp_path: Path) -> None:
    _write(tmp_path)
    config = write_config(tmp_path / "ds.json", stage=2)
    run_ranks(finetune, 2, *_words(tmp_path, "whole", config, workers=0))
    out = tmp_path / "out"
    given = _words(tmp_path, "out", config, save_steps=1, resume="auto")
    run = Run([*given, "--workers", "1"], ranks=2, folder=tmp_path / "logs")
    _wait_for_a_step(run, out, 1)
    children = psutil.Process(run.processes[0].pid).children()
    [worker] = [each for each in children if "spawn_main" in " ".join(each.cmdline())]
    worker.terminate()  # as DeepSpeed's launcher does when it ends a rank, which then saves
    _wait_for_a_step(run, out, 2)
    worker.kill()
    assert run.end(launcher=False) == [1, 1], run.output()
    assert not worker.is_running()
    said = "rank 0: --workers: got a data worker that ended (exit code -9)"
    assert all(said in log.read_text() for log in run.logs), run.output()
    assert f"(the next batch has {tmp_path}/train.jsonl:" in run.output()
    assert len(_losses(out)) < STEPS
    run_ranks(finetune, 2, *given, "--workers", "0")
    assert _losses(out) == _losses(tmp_path / "whole")
