"""Checkpoints that are damaged, disks that are full, and folders that are somebody else's."""

from __future__ import annotations

import os
import pickle
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from safetensors import SafetensorError

from ds_lvx.distributed.channel import Channel
from ds_lvx.training import disk, ending
from ds_lvx.training.export import save_pretrained
from ds_lvx.training.lock import held
from ds_lvx.training.model import Source
from ds_lvx.training.progress import Progress
from ds_lvx.training.run_state import Checkpoints, RunState, SaveError
from tests.ranks import RankError, run_ranks

STATE = {"weights": torch.arange(1 << 18)}  # 2 MiB


class _Torch:
    """What DeepSpeed saves and loads with."""

    def save(self, state_dict: Any, path: str) -> None:
        torch.save(state_dict, path)

    def load(self, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=False)


class Engine:
    """Saves one file a rank by its checkpoint engine, as DeepSpeed does."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.checkpoint_engine: Any = _Torch()

    def save_checkpoint(self, folder: str, tag: str, **_options: Any) -> None:
        self.checkpoint_engine.save(STATE, str(Path(folder, tag, f"weights-{self.rank}.pt")))


def state_of(step: int) -> RunState:
    return RunState(step, step, 2, 2, 3, 1, 0, "data", "names")


def alone(folder: Path, *, keep: int = 3) -> Checkpoints:
    """Of a process by itself."""
    return Checkpoints(folder, Channel(None), keep=keep, only_trained=False)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Steps 1, 2 and 3."""
    for step in (1, 2, 3):
        alone(tmp_path).save(Engine(0), state_of(step))
    return tmp_path


def flip(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 4
    path.write_bytes(contents)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: list[tuple[Callable[[Path], object], str, str]] = [
    (flip, "weights-0.pt", "its contents have changed"),
    (cut, "weights-0.pt", "bytes; expected"),
    (empty, "random-0.pt", "0 bytes; expected"),
    (Path.unlink, "run.json", "not there"),
    (Path.unlink, "manifest.json", "not there"),
    (empty, "manifest.json", "cannot be read"),
]


@pytest.mark.parametrize(("damage", "name", "words"), DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_last_whole_one_named(
    saved: Path, damage: Callable[[Path], object], name: str, words: str
) -> None:
    damage(saved / "step-00000003" / name)
    checkpoints = alone(saved)
    for wanted in ("latest", str(saved / "step-00000003")):
        with pytest.raises(ValueError, match="which is damaged") as caught:
            checkpoints.find(wanted)
        assert f"step-00000003/{name}: " in str(caught.value)
        assert words in str(caught.value)
        assert f"the newest that is whole is {saved / 'step-00000002'}" in str(caught.value)
        assert "--resume whole" in str(caught.value)
    for wanted in ("whole", "auto", str(saved / "step-00000002")):
        assert checkpoints.find(wanted) == saved / "step-00000002"


def test_where_nothing_is_whole_it_says_so(saved: Path) -> None:
    for step in (1, 2, 3):
        flip(saved / f"step-{step:08d}" / "weights-0.pt")
    for wanted in ("latest", "whole", "auto"):
        with pytest.raises(ValueError, match="no other checkpoint there is whole"):
            alone(saved).find(wanted)


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-00000001.partial").mkdir()
    assert alone(tmp_path).find("auto") is None
    for wanted in ("latest", "whole"):
        with pytest.raises(ValueError, match="without a checkpoint"):
            alone(tmp_path).find(wanted)


class _Late(Checkpoints):
    @property
    def latest(self) -> Path:
        return self.folder / "step-00000001"


def find_on_rank(folder: Path, wanted: str) -> str:
    """Where the pointer changes between one rank's look and the other's."""
    world = Channel.world()
    kind = Checkpoints if world.rank == 0 else _Late
    return str(kind(folder, world, keep=3, only_trained=False).find(wanted))


def test_all_ranks_resume_from_the_checkpoint_that_rank_0_saw(saved: Path) -> None:
    assert run_ranks(find_on_rank, 2, saved, "latest") == [str(saved / "step-00000003")] * 2


def test_every_rank_says_which_file_of_another_is_damaged(saved: Path) -> None:
    flip(saved / "step-00000003" / "weights-0.pt")
    with pytest.raises(RankError) as caught:
        run_ranks(find_on_rank, 2, saved, "latest")
    assert set(caught.value.errors) == {0, 1}
    assert all("step-00000003/weights-0.pt" in text for text in caught.value.errors.values())


# ---- what cannot be written


def save_on_a_full_disk(folder: Path) -> list[str]:
    """Step 1 is written; at step 2 rank 1 may write no file of that size; then step 3 may be."""
    world = Channel.world()
    checkpoints = Checkpoints(folder, world, keep=3, only_trained=False)
    checkpoints.save(Engine(world.rank), state_of(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        checkpoints.save(Engine(world.rank), state_of(2))
    except SaveError as error:
        said = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.save(Engine(world.rank), state_of(3))
    return [said, *sorted(path.name for path in folder.iterdir())]


def test_a_full_disk_is_named_on_all_ranks_and_the_next_save_works(tmp_path: Path) -> None:
    for said, *left in run_ranks(save_on_a_full_disk, 2, tmp_path):
        assert "rank 1: " in said
        assert "step-00000002.partial/weights-1.pt: " in said
        assert "(2.0 MiB to write, " in said
        assert f"{tmp_path / 'step-00000001'} stays in force" in said
        assert left == ["latest", "step-00000001", "step-00000003"]


class Unwritten(torch.nn.Linear):
    """A model on a full disk."""

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        folder.mkdir()
        raise SafetensorError("No space left on device")


def test_a_model_that_cannot_be_written_is_named_with_the_room(tmp_path: Path) -> None:
    engine = SimpleNamespace(module=Unwritten(2, 2), zero_optimization_stage=lambda: 0)
    source, folder = Source.of("tiny"), tmp_path / "model"
    with pytest.raises(ValueError, match=r"model\.partial: No space left .* free on its disk\)"):
        save_pretrained(engine, source, folder, world=Channel(None), adapter=False)
    assert list(tmp_path.iterdir()) == []


def test_lines_that_cannot_be_written_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(tmp_path, rank=0, total_steps=3)
    progress.log_evaluation(step=1, eval_loss=3.0)
    path_open = Path.open

    def full(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == "metrics.jsonl":
            raise OSError(28, "No space left on device")
        return path_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    progress.log_evaluation(step=2, eval_loss=2.0)
    progress.log_evaluation(step=3, eval_loss=1.0)
    monkeypatch.undo()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    progress.log_evaluation(step=4, eval_loss=0.0)
    progress.close()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 4
    said = capsys.readouterr().out
    assert said.count("No space left on device") == 1


# ---- what a file may hold


class Payload:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_runs_code_is_refused(tmp_path: Path, *, zipped: bool) -> None:
    path = tmp_path / "state.pt"
    state = {"weights": torch.ones(2), "more": Payload(tmp_path / "ran")}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"state.pt: got an object of .*pass --trust_checkpoint"):
        disk.Written(_Torch()).load(str(path))
    assert not (tmp_path / "ran").exists()
    disk.Written(_Torch(), trusted=True).load(str(path))
    assert (tmp_path / "ran").exists()


class Named:
    """Pickles as Python 3.11.0 to 3.11.3 pickle the member of an enum: by ``getattr``."""

    def __init__(self, of: Any, name: str) -> None:
        self.asked = of, name

    def __reduce__(self) -> Any:
        return getattr, self.asked


def test_a_stage_is_read_by_its_name_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save({"zero_stage": Named(ZeroStageEnum, "weights")}, path)
    assert disk.Written(_Torch()).load(str(path)) == {"zero_stage": ZeroStageEnum.weights}
    for of, name in ((ZeroStageEnum, "__init__"), (LossScaler, "backward")):
        torch.save({"zero_stage": Named(of, name)}, path)
        with pytest.raises(ValueError, match=r"object of builtins\.getattr.*--trust_checkpoint"):
            disk.Written(_Torch()).load(str(path))


def test_plain_pickles_are_refused_as_well(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(ValueError, match="pass --trust_checkpoint"):
        disk.Written(_Torch()).load(str(path))
    assert not (tmp_path / "ran").exists()


# ---- one run a folder, and its end


def test_a_second_run_in_a_folder_is_refused(tmp_path: Path) -> None:
    world = Channel(None)
    with held(tmp_path / "out", world):
        with (
            pytest.raises(ValueError, match="which another run is writing to"),
            held(tmp_path / "out", world),
        ):
            pass
        with held(tmp_path / "other", world):
            pass
    with held(tmp_path / "out", world):
        pass
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_without_locks_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of Lustre without ``flock``; a run that was killed there must not stop the next."""

    def missing(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", missing)
    with held(tmp_path, Channel(None)):
        assert list(tmp_path.iterdir()) == []
    assert "has no locks" in capsys.readouterr().out


@pytest.fixture
def handlers() -> Iterator[dict[signal.Signals, Any]]:
    before = {number: signal.getsignal(number) for number in ending.SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ending.SIGNALS)
def test_a_signal_is_noted_and_told_to_all_ranks(
    number: signal.Signals, handlers: dict[signal.Signals, Any]
) -> None:
    with pytest.raises(ValueError, match="broken"), ending.Ending():
        raise ValueError("broken")
    assert signal.getsignal(number) == handlers[number]
    with ending.Ending() as watched:
        assert watched.asked() == {}
        signal.raise_signal(number)
        record = watched.asked()
    signal.raise_signal(number)  # a late one ends nobody
    ending.raise_if_asked([{}, {}])
    with pytest.raises(ending.EndAskedError, match=f"rank 1 got {number.name}") as caught:
        ending.raise_if_asked([{}, record])
    assert caught.value.exit_code == 128 + number


def test_a_launcher_that_has_gone_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def process(pid: int, *words: str) -> Any:
        return SimpleNamespace(pid=pid, cmdline=lambda: list(words), is_running=lambda: pid != 7)

    launch = process(8, "python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=...")
    above = [launch, process(7, "python", "/envs/x/bin/deepspeed", "--num_gpus", "2")]
    torchrun = [process(7, "python", "/envs/deepspeed/bin/torchrun"), process(8, "bash")]
    others = [process(7, "bash", "my-torchrun.sh"), process(7, "bash", "my-deepspeed.sh")]
    cases = ((above, True), (torchrun, True), (others, False), ([launch, others[1]], False))
    for parents, found in cases:
        this = SimpleNamespace(parents=lambda parents=parents: parents)
        monkeypatch.setattr(ending.psutil, "Process", lambda this=this: this)
        record = ending.Ending().asked()
        assert bool(record) == found
        assert not found or record["end"] == ["the launcher, process 7, has ended", 143]
