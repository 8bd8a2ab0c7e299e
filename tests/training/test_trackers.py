"""`--report_to`: what metrics.jsonl holds reaches a tracker, and the tables as text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ds_lvx.training.progress import Progress
from ds_lvx.training.trackers import Trackers, check_trackers

pytest.importorskip("tensorboard")


def read(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, str]]:
    """Numbers and texts that TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [path] = {file.parent for file in (folder / "logs" / folder.name).glob("events.*")}
    events = EventAccumulator(str(path)).Reload()
    numbers = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    texts = {
        tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
    }
    return numbers, texts


def test_tensorboard_gets_the_metrics_and_the_tables(tmp_path: Path) -> None:
    trackers = Trackers(["tensorboard", "none"], tmp_path, {"seed": 3, "fps": None, "model": "m"})
    progress = Progress(tmp_path, rank=0, total_steps=2, trackers=trackers)
    progress.text("layers", "layer  method\na      lvx")
    for step in (1, 2):
        progress.log(step=step, loss=3.0 / step, learning_rate=1e-3)
    progress.log_evaluation(step=2, eval_loss=2.0)
    progress.close()
    progress.close()
    numbers, texts = read(tmp_path)
    assert numbers["loss"] == [(1, 3.0), (2, 1.5)]
    assert numbers["eval_loss"] == [(2, 2.0)]
    assert {"learning_rate", "tokens_per_second", "memory_gib"} <= set(numbers)
    assert texts["layers/text_summary"] == "    layer  method\n    a      lvx\n"


@pytest.mark.parametrize("named", [None, "elsewhere"])
def test_wandb_keeps_its_files_in_the_output_folder_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    """By a stand-in for Weights & Biases, which makes no folder."""
    import accelerate.tracking

    made: list[dict[str, Any]] = []

    class Stub(accelerate.tracking.GeneralTracker):  # type: ignore[misc]
        name, requires_logging_directory, tracker = "wandb", False, None

        def __init__(self, project: str, **arguments: Any) -> None:
            super().__init__()
            made.append({"project": project, **arguments})

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Stub)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    if named is not None:
        monkeypatch.setenv("WANDB_DIR", named)
    Trackers(["wandb"], tmp_path, {}).finish()
    [arguments] = made
    assert arguments.get("dir") == (None if named else tmp_path / "logs")
    assert arguments["project"] == tmp_path.name
    assert (tmp_path / "logs").is_dir() == (named is None)


def test_a_run_goes_on_without_a_tracker_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no room")

    from accelerate.tracking import TensorBoardTracker

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    monkeypatch.setattr(TensorBoardTracker, "finish", fail)
    trackers = Trackers(["tensorboard"], tmp_path, {})
    progress = Progress(tmp_path, rank=0, total_steps=2, trackers=trackers)
    for step in (1, 2):
        progress.log(step=step, loss=3.0 / step)
    progress.close()
    told = capsys.readouterr().out
    assert told.count("warning: --report_to tensorboard: no room; it gets nothing more") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_what_is_not_there_is_an_error_with_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers([])
    check_trackers(["none"])
    check_trackers(["tensorboard"])
    with pytest.raises(ValueError, match=r"got 'tensorbord'; expected some of .*tensorboard"):
        check_trackers(["tensorbord"])
    with pytest.raises(ValueError, match=r"got comet_ml, which is not installed; .*tensorboard"):
        check_trackers(["comet_ml"])
    monkeypatch.setitem(sys.modules, "accelerate.tracking", None)
    with pytest.raises(ValueError, match="got no accelerate"):
        check_trackers(["tensorboard"])
