"""However a run ends, it leaves a whole checkpoint, and one that resumes has the same losses.

By hand, as many as wanted::

    LVX_KILLS=500 python -m pytest tests/launch/test_finetune_kills.py -s
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from torch.utils import cpp_extension

import ds_lvx
from ds_lvx.training import disk
from ds_lvx.training.ending import SIGNALS
from ds_lvx.training.loop import Trainer
from ds_lvx.training.progress import Progress
from ds_lvx.training.run_state import Checkpoints
from tests.data.media import chat, write_image, write_jsonl
from tests.launch.finetune_runs import arguments, finetune_main, write_config
from tests.launch.forked_runs import Kill, Run
from tests.ranks import FORKED

KILLS = int(os.environ.get("LVX_KILLS", "20"))
SEED = int(os.environ.get("LVX_KILLS_SEED", "0"))
STEPS = 4


def check(run: Run, out: Path) -> None:
    """What holds after every end, whatever it was."""
    checkpoints = out / "checkpoints"
    latest = checkpoints / "latest"
    if latest.exists():
        path = checkpoints / latest.read_text().strip()
        assert disk.faults(path) == [], path
    left = list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{run.port}_*"))
    # A rank that is killed while the others look for its buffer leaves it to a later start.
    assert not left or "ds_lvx: " not in run.output(), left
    for buffer in left:
        buffer.unlink()
    release(Path(cpp_extension._get_build_directory("deepspeed_shm_comm", verbose=False), "lock"))


def release(lock: Path) -> None:
    """Take away the lock of a build that a killed rank has left; others hold it for a moment."""
    with suppress(FileNotFoundError):
        since = lock.stat().st_mtime
        for _ in range(50):
            time.sleep(0.1)
            if lock.stat().st_mtime != since:
                return
        lock.unlink()


def losses(out: Path) -> list[float]:
    """Of every step, in order."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def warn() -> None:
    """This rank, by every signal that announces an end."""
    for number in SIGNALS:
        signal.raise_signal(number)


def behind(owner: Any, name: str, then: Callable[..., None]) -> None:
    """Call ``then`` behind every call of a method, with its first argument; in a forked rank."""
    before = getattr(owner, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        returned = before(*args, **kwargs)
        then(*args[:1])
        return returned

    setattr(owner, name, both)


def warned_late(words: Sequence[str]) -> int:
    """The script; from the saving on each rank is warned again, wherever it stands."""
    for owner, name in ((Checkpoints, "save"), (Trainer, "export"), (Progress, "close")):
        behind(owner, name, lambda *_: warn())
    behind(ds_lvx, "shutdown", lambda *_: warn())
    code = finetune_main(words)
    warn()
    return code


def asked_and_warned_late(words: Sequence[str]) -> int:
    """As `warned_late`, with a first signal to one rank in the middle of the run."""

    def ask(trainer: Trainer) -> None:
        if trainer.step == 2 and os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGUSR1)

    behind(Trainer, "_take_step", ask)
    return warned_late(words)


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
@pytest.mark.parametrize(("main", "code"), [(warned_late, 0), (asked_and_warned_late, 138)])
def test_a_signal_behind_the_saving_changes_nothing(
    main: Callable[[Sequence[str]], int], code: int, folder: Path, tmp_path: Path
) -> None:
    given = words(folder, tmp_path / "out", ranks=2)
    given[given.index("--save_steps") + 1] = "100"
    run = Run(given, ranks=2, folder=tmp_path, main=main)
    assert run.end() == [code] * 2, run.output()
    assert "error" not in run.output()
    if code == 0:
        assert (tmp_path / "out" / "model").exists()
        return
    assert "rank 1 got SIGUSR1: the run ends after step 2" in run.output()
    (saved,) = (tmp_path / "out" / "checkpoints").glob("step-*")
    assert saved.name == "step-00000002"
    assert disk.faults(saved) == []


@pytest.mark.parametrize(
    ("ranks", "share"),
    [
        pytest.param(2, 0.05, marks=pytest.mark.exhaustive),
        pytest.param(2, 0.7, marks=pytest.mark.exhaustive),
        pytest.param(3, 0.3, marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(
    folder: Path, tmp_path: Path, ranks: int, share: float
) -> None:
    first = FORKED.Process(target=int)  # else the run would also wait for the server that forks
    first.start()
    first.join()
    whole = Run(words(folder, tmp_path / "whole", ranks=ranks), ranks=ranks, folder=tmp_path)
    assert whole.end() == [0] * ranks, whole.output()
    expected = losses(tmp_path / "whole")
    assert len(set(expected)) == STEPS
    within_s = whole.took_s(tmp_path / "whole")
    numbers = random.Random(SEED + ranks)
    out, left, number = tmp_path / "0", round(KILLS * share), 0
    while left > 0:
        kill = Kill.at_random(numbers, ranks=ranks, within_s=within_s)
        run = Run(words(folder, out, ranks=ranks), ranks=ranks, folder=tmp_path / "logs")
        codes = run.end(kill)
        check(run, out)
        if codes == [0] * ranks:  # it was done before its time came
            assert losses(out) == expected
            within_s = min(within_s, run.took_s(out))
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
