"""`launch/finetune.py` ends with its best evaluation and stops where there is no better, resumed or
not; what it evaluates on may be held out of its data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

from ds_lvx.data.chat import Chats
from tests.data.media import chat, write_image, write_jsonl, write_video
from tests.launch.checkpoint_folder import write_checkpoint
from tests.launch.finetune_runs import (
    arguments,
    finetune,
    metrics,
    one_process_loss,
    one_process_samples,
    write_config,
)
from tests.ranks import RankError, run_ranks

pytestmark = pytest.mark.slow
FRAMES = 2
HELD_OUT, SEED = 3, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("best")
    write_checkpoint(folder / "checkpoint")
    write_video(folder / "a.mp4", frames=9)
    write_image(folder / "a.png", (100, 40))
    samples = [
        chat(("video", "a.mp4"), ("text", f"Question {n}?"), answer=answer)
        for n, answer in enumerate(("A rabbit.", "A meadow.", "It is green.", "No.", "Gone."))
    ]
    samples += [chat(("image", "a.png"), ("text", "And?"), answer="Blue"), samples[0]]
    write_jsonl(folder / "train.jsonl", *samples)
    return folder


def words(folder: Path, out: Path, config: str, **options: object) -> list[str]:
    given = {
        "model": folder / "checkpoint",
        "data": folder / "train.jsonl",
        "frames": FRAMES,
        "deepspeed_config": config,
        "output_dir": out,
        "val_size": HELD_OUT,
        "seed": SEED,
        "learning_rate": 0.3,  # so that it soon gets worse
        "lr_scheduler": "constant",
        "max_steps": 9,
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "early_stopping_patience": 2,
        **options,
    }
    return list(arguments(**given))


def held_out(folder: Path, to: Path) -> Path:
    """The samples that are evaluated on, in a file of their own."""
    lines = (folder / "train.jsonl").read_text().splitlines()
    some, _ = Chats(folder / "train.jsonl").split(HELD_OUT, seed=SEED)
    return write_jsonl(to, *[lines[some.source(n).line - 1] for n in range(len(some))])


@pytest.mark.parametrize(
    "stage", [2, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (0, 1, 3))]
)
def test_the_best_is_saved_and_a_resumed_run_finds_it_too(
    folder: Path, tmp_path: Path, stage: int
) -> None:
    config = write_config(tmp_path / "ds.json", stage=stage)
    out, again = tmp_path / "out", tmp_path / "again"
    options = {"save_steps": 1, "keep_checkpoints": 1}
    run_ranks(finetune, 2, *words(folder, out, config, **options))

    losses = {row["step"]: row["eval_loss"] for row in metrics(out)[1]}
    best, last = min(losses, key=lambda step: losses[step]), max(losses)
    assert best >= 1
    assert last == best + 2 < 9, "it stops after two evaluations that are no better"
    kept = sorted(path.name for path in (out / "checkpoints").glob("step-*"))
    assert kept == [f"step-{step:08d}" for step in (best, last)]
    model = AutoModelForImageTextToText.from_pretrained(out / "model")
    data = held_out(folder, folder / "held_out.jsonl")
    loss = one_process_loss(model, one_process_samples(out / "model", data, frames=FRAMES))
    assert loss == pytest.approx(losses[best], abs=1e-4)
    assert loss < losses[last] - 1e-3

    # Interrupted one evaluation after the best, it waits for one more only, and takes the same.
    state = json.loads((out / "checkpoints" / kept[0] / "run.json").read_text())["best"]
    assert state == {
        "metric": "eval_loss",
        "value": pytest.approx(losses[best]),
        "step": best,
        "waited": 0,
    }
    run_ranks(finetune, 2, *words(folder, again, config, **options, max_steps=best + 1))
    assert [row["step"] for row in metrics(again)[1]] == list(range(1, best + 2))
    shutil.rmtree(again / "model")
    found = words(folder, again, config, **options, resume=True)
    run_ranks(finetune, 2, *found)
    assert {row["step"]: row["eval_loss"] for row in metrics(again)[1]} == losses
    weights = [next((each / "model").glob("*.safetensors")) for each in (out, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.exhaustive
def test_a_best_checkpoint_that_is_gone(folder: Path, tmp_path: Path) -> None:
    """Damaged it is an error at the end, with the last weights saved; lost it is a warning."""
    config = write_config(tmp_path / "ds.json", stage=2)
    out = tmp_path / "out"
    run_ranks(finetune, 2, *words(folder, out, config, save_steps=1, keep_checkpoints=1))
    best, last = sorted((out / "checkpoints").glob("step-*"))
    shutil.rmtree(out / "model")
    file = next(best.glob("*model_states.pt"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RankError, match=r"--load_best_model_at_end: got no whole checkpoint"):
        run_ranks(finetune, 2, *words(folder, out, config, resume=last))
    assert not (out / "model").exists()
    shutil.rmtree(best)
    run_ranks(finetune, 2, *words(folder, out, config, resume=last, max_steps=10, eval_steps=2))
    assert (out / "model").exists()
