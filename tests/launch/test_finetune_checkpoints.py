"""A checkpoint that cannot be finished leaves the one before it in force, on all ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_lvx.distributed.channel import Channel
from ds_lvx.training import disk
from ds_lvx.training.engine import renew_learning_rate
from ds_lvx.training.inputs import BatchSizes, batch_sizes, read_inputs
from ds_lvx.training.options import parse
from ds_lvx.training.progress import Progress
from ds_lvx.training.run_state import Checkpoints, RunState
from tests.ranks import run_ranks


class _Engine:
    """Saves one small file a rank, or fails."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def save_checkpoint(self, folder: str, tag: str, **_options: Any) -> None:
        target = Path(folder) / tag
        target.mkdir(exist_ok=True)
        (target / f"weights-{self.rank}").write_text("w")


def _state(step: int) -> RunState:
    return RunState(step, step, 2, 2, 3, 1, 0, "data", "names")


def save_three(folder: Path) -> list[str]:
    """Save step 1, fail on rank 1 at step 2, save step 3; what is there after each."""
    world = Channel.world()
    checkpoints = Checkpoints(folder, world, keep=1, only_trained=False)
    engine = _Engine(world.rank)
    latest = []
    for step in (1, 2, 3):
        if step == 2 and world.rank == 1:
            checkpoints._write_own = _disk_full  # type: ignore[method-assign]
        try:
            checkpoints.save(engine, _state(step))
        except ValueError as error:
            latest.append(str(error))
        finally:
            checkpoints.__dict__.pop("_write_own", None)
        assert checkpoints.latest is not None
        latest.append(checkpoints.latest.name)
    return latest


def _disk_full(partial: Path, state: RunState) -> None:
    raise OSError("no space left on device")


def test_a_save_that_fails_on_one_rank_changes_nothing(tmp_path: Path) -> None:
    for latest in run_ranks(save_three, 2, tmp_path):
        assert latest[0] == "step-00000001"
        assert "rank 1" in latest[1]
        assert "no space left" in latest[1]
        assert latest[2:] == ["step-00000001", "step-00000003"]
    # The unfinished one is gone, and so is the first, of which one was to be kept.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]
    files = sorted(path.name for path in (tmp_path / "step-00000003").iterdir())
    names = ["random-0.pt", "random-1.pt", "run.json", "weights-0", "weights-1"]
    assert files == ["manifest.json", *names]
    assert disk.faults(tmp_path / "step-00000003") == []


def save_in_the_past(folder: Path) -> str:
    """Steps 7 and 8 are there, and a run that resumed from step 3 saves its step 4."""
    world = Channel.world()
    checkpoints = Checkpoints(folder, world, keep=1, only_trained=False)
    if world.rank == 0:
        for step in (3, 7, 8):
            (folder / f"step-{step:08d}").mkdir()
    checkpoints.save(_Engine(world.rank), _state(4))
    assert checkpoints.latest is not None
    assert checkpoints.latest.is_dir()
    return checkpoints.latest.name


def test_a_checkpoint_just_written_stays(tmp_path: Path) -> None:
    assert set(run_ranks(save_in_the_past, 2, tmp_path)) == {"step-00000004"}
    kept = sorted(path.name for path in tmp_path.glob("step-*"))
    assert kept == [f"step-{step:08d}" for step in (4, 7, 8)]


def test_metrics_that_were_cut_off_do_not_stop_a_resume(tmp_path: Path) -> None:
    rows = ['{"step": 1, "loss": 2.0}', '{"step": 2, "loss": 1.0}', '{"step": 2, "lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    progress = Progress(tmp_path, rank=0, total_steps=3)
    progress.start(1)
    progress.close()
    assert (tmp_path / "metrics.jsonl").read_text() == rows[0] + "\n"


def test_the_learning_rate_after_a_resume_is_that_of_the_schedule() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    scheduler.last_epoch = 4
    optimizer.param_groups[0]["lr"] = 0.0  # as a schedule of 4 steps left it
    renew_learning_rate(SimpleNamespace(lr_scheduler=scheduler, optimizer=optimizer))
    assert optimizer.param_groups[0]["lr"] == 0.6


@pytest.mark.parametrize("name", ["a-file", "/proc/nowhere/out"])
def test_an_output_folder_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "a-file").touch()
    config = Path(__file__).parents[2] / "ds_configs" / "finetune-cpu.json"
    words = ["--model", "tiny", "--data", "none.jsonl", "--deepspeed_config", str(config)]
    with pytest.raises(ValueError, match=r"--output_dir: got .*name another"):
        read_inputs(parse([*words, "--output_dir", str(tmp_path / name)]), 2)


@pytest.mark.parametrize("more", [[], ["--resume", "auto"]])
def test_the_model_of_a_run_that_is_over_is_not_written_over(
    more: list[str], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    config = Path(__file__).parents[2] / "ds_configs" / "finetune-cpu.json"
    words = ["--model", "tiny", "--data", "none.jsonl", "--deepspeed_config", str(config)]
    with pytest.raises(ValueError, match="which holds the model of a run; expected a new folder"):
        read_inputs(parse([*words, "--output_dir", str(tmp_path), *more]), 2)


def test_lora_without_its_package_is_said_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    config = Path(__file__).parents[2] / "ds_configs" / "finetune-cpu.json"
    words = ["--model", "tiny", "--data", "none.jsonl", "--deepspeed_config", str(config)]
    with pytest.raises(ValueError, match=r"--lora_r: got no package 'peft'.*ds_lvx\[lora\]"):
        read_inputs(parse([*words, "--output_dir", str(tmp_path), "--lora_r", "4"]), 2)


def test_batch_sizes_are_deepspeeds() -> None:
    both = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}
    assert batch_sizes(both, 4) == BatchSizes(2, 3, 4)
    assert batch_sizes(both, 4).per_step == 24
    assert batch_sizes({"train_batch_size": 24}, 4) == BatchSizes(6, 1, 4)
    partly = {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 2}
    assert batch_sizes(partly, 4) == BatchSizes(2, 3, 4)
    partly = {"train_batch_size": 24, "gradient_accumulation_steps": 3}
    assert batch_sizes(partly, 4) == BatchSizes(2, 3, 4)
    assert batch_sizes({"train_micro_batch_size_per_gpu": 2}, 4) == BatchSizes(2, 1, 4)
    for wrong in ({}, {"train_batch_size": 3}, {**both, "train_batch_size": 23}):
        with pytest.raises(ValueError, match="leave train_batch_size out"):
            batch_sizes(wrong, 4)
