"""However a run ends, it leaves a whole checkpoint, and one that resumes has the same losses."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from tests.data.media import chat, write_image, write_jsonl
from tests.launch.finetune_runs import arguments, write_config
from tests.launch.kills import Kill, Run, check, losses

KILLS = int(os.environ.get("LVX_KILLS", "20"))
SEED = int(os.environ.get("LVX_KILLS_SEED", "0"))
STEPS = 6


def words(folder: Path, out: Path, *, ranks: int) -> list[str]:
    config = write_config(folder / f"ds-{ranks}.json", stage=2, sp_size=ranks)
    given = arguments(
        model="tiny",
        data=folder / "train.jsonl",
        deepspeed_config=config,
        output_dir=out,
        max_steps=STEPS,
        save_steps=1,
        learning_rate=1e-3,
        resume="auto",
    )
    return list(given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    write_image(folder / "a.png")
    questions = [chat(("image", "a.png"), ("text", f"{i}?"), answer=f"{i}.") for i in range(5)]
    write_jsonl(folder / "train.jsonl", *questions)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "share"), [(2, 0.7), (3, 0.3)])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(
    folder: Path, tmp_path: Path, ranks: int, share: float
) -> None:
    whole = Run(words(folder, tmp_path / "whole", ranks=ranks), ranks=ranks, folder=tmp_path)
    assert whole.end() == [0] * ranks, whole.output()
    expected = losses(tmp_path / "whole")
    assert len(set(expected)) == STEPS
    checkpoints = sorted((tmp_path / "whole" / "checkpoints").glob("step-*"))
    took_s = max(path.stat().st_mtime for path in checkpoints) - whole.began
    numbers = random.Random(SEED + ranks)
    out, left, number = tmp_path / "0", round(KILLS * share), 0
    while left > 0:
        kill = Kill.at_random(numbers, ranks=ranks, within_s=took_s)
        run = Run(words(folder, out, ranks=ranks), ranks=ranks, folder=tmp_path / "logs")
        codes = run.end(kill)
        check(run, out)
        if codes == [0] * ranks:  # it was done before its time came
            assert losses(out) == expected
            number += 1
            out = tmp_path / str(number)
            continue
        left -= 1
        if kill.signal == signal.SIGTERM and "got SIGTERM" in run.output():
            assert codes[kill.victim] != 0, (kill, run.output())
            assert "the run ends after step" in run.output(), (kill, run.output())
    last = Run(words(folder, out, ranks=ranks), ranks=ranks, folder=tmp_path / "logs")
    assert last.end() == [0] * ranks, last.output()
    assert losses(out) == expected
