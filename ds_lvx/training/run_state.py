"""Checkpoints to resume from: all or nothing on the disk, and only by a run that goes on the same.

    output_dir/checkpoints/step-00000020/    DeepSpeed's files, run.json, random-<rank>.pt,
                                             manifest.json: sizes and sums of all of them
    output_dir/checkpoints/latest            "step-00000020"

With ``--load_best_model_at_end`` the checkpoint of the best evaluation is kept beside the newest.
A checkpoint is written under another name, synced, summed, and renamed when all ranks are done;
``latest`` changes last. Whatever breaks in between, the power included, leaves the one before as
it was. Before a checkpoint is read, every file of it is held against its sum. The folder must be
shared by all nodes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.together import together, told
from ds_lvx.training import disk
from ds_lvx.training.model import parameter_groups
from ds_lvx.training.moving import States, check_target, order_of, place_states, read_states

_PARTIAL = ".partial"
_RUN = "run.json"
LATEST, WHOLE, AUTO = "latest", "whole", "auto"
"""What `Checkpoints.find` may be asked for, beside a folder; the first is a file's name, too."""
# What must be the same in the run that resumes, and what to do where it is not.
_SAME = {
    "samples_per_step": "set the batch size and gradient accumulation of the ds_config so that "
    "times the replicas they make it",
    "seed": "pass it as --seed",
    "data": "give the same --data, --val_size, --fps or --frames, --group_by_length and "
    "share_prefixes of the ds_config; to go on with other data, start a new run with --model "
    "output_dir/model",
    "trained": "give the same --model, --lora_r, --lora_target_modules, --lora_modules_to_save and "
    "--freeze_vision",
    "quantized": "give --load_in_4bit, or leave it out, and the same --model as that run",
}


@dataclass(frozen=True)
class RunState:
    """What a run is and where it stands.

    Attributes:
        step: optimizer steps done.
        samples_seen: by all replicas; the place in the data.
        world_size, sequence_parallel_size, zero_stage, samples_per_step, seed: of the run.
        data: fingerprint of the data and of the choice of frames.
        trained: fingerprint of the names and shapes of what trains.
        best: `ds_lvx.training.best.Watch.record`; None of a run before there were such.
        quantized: whether weights that do not train are packed, by the run or by their checkpoint.
    """

    step: int
    samples_seen: int
    world_size: int
    sequence_parallel_size: int
    zero_stage: int
    samples_per_step: int
    seed: int
    data: str
    trained: str
    best: Mapping[str, Any] | None = None
    quantized: bool = False


def written(folder: Path) -> list[Path]:
    """The checkpoints of a folder that were finished, the newest first."""
    return sorted((p for p in folder.glob("step-*") if p.suffix != _PARTIAL), reverse=True)


def _name(step: int) -> str:
    return f"step-{step:08d}"


class SaveError(ValueError):
    """A checkpoint could not be written; the ones before are as they were."""


class Checkpoints:
    """The checkpoints of one output folder.

    Args:
        folder: ``output_dir/checkpoints``.
        world: all ranks.
        keep: how many to keep.
        only_trained: leave frozen weights out, which the model brings along (LoRA).
        trusted: read files that may run code (`ds_lvx.training.disk.Written`).
    """

    def __init__(
        self,
        folder: Path,
        world: Channel,
        *,
        keep: int,
        only_trained: bool,
        trusted: bool = False,
    ) -> None:
        self.folder = folder
        self._trusted = trusted
        self._world = world
        self._keep = keep
        self._only_trained = only_trained

    @property
    def latest(self) -> Path | None:
        """The checkpoint that was written last, or None."""
        pointer = self.folder / LATEST
        return self.folder / pointer.read_text().strip() if pointer.is_file() else None

    def find(self, wanted: str) -> Path | None:
        """The checkpoint to resume from, the same on all ranks, every file of it as it was written.

        Args:
            wanted: ``"latest"``; ``"whole"``: the newest that is whole; ``"auto"``: the same, or
                None where none was ever written; or a checkpoint's folder.

        Raises:
            ValueError: on all ranks: there is none, or it is damaged; names the files, and the
                newest that is whole.

        Collectives: agreements, two for each checkpoint that is looked at.
        """
        found, damaged = None, []
        for name in self._told_by_first(lambda: self._candidates(wanted)):
            path = Path(name)
            faults = self._faults(path)
            if not faults:
                found = path
                break
            damaged.append("\n".join([f"--resume: got {path}, which is damaged:", *faults]))
        if found is not None and (not damaged or wanted in (WHOLE, AUTO)):
            return found
        if not damaged:
            if wanted == AUTO:
                return None
            raise ValueError(
                f"--resume: got {self.folder.parent} without a checkpoint; expected one that a run "
                "with --save_steps wrote; leave --resume out to start anew"
            )
        todo = (
            "no other checkpoint there is whole; start anew with another --output_dir"
            if found is None
            else f"the newest that is whole is {found}; pass --resume {WHOLE} to go on from there"
        )
        raise ValueError("\n".join([damaged[0], todo]))

    def _candidates(self, wanted: str) -> list[str]:
        """Folders to look at, one after the other; those after the first for the way out."""
        if wanted in (LATEST, WHOLE, AUTO):
            first, others = self.latest, written(self.folder)
        else:
            first = Path(wanted)
            others = written(first.parent)
            if not any((first / name).is_file() for name in (_RUN, disk.MANIFEST)):
                raise ValueError(
                    f"--resume: got {first}, which is no checkpoint of this script; expected a "
                    "folder output_dir/checkpoints/step-...; check the path"
                )
        ordered = [] if first is None else [first]
        ordered += [other for other in others if first is None or other.name != first.name]
        return [str(path) for path in ordered]

    def _told_by_first(self, find: Callable[[], list[str]]) -> list[str]:
        """What rank 0 found, on all ranks: a shared folder may look different to each of them."""
        is_first = self._world.rank == 0
        _, records = told(self._world, lambda: (None, {"found": find() if is_first else []}))
        found: list[str] = records[0]["found"]
        return found

    def _faults(self, path: Path) -> list[str]:
        """What is wrong with a checkpoint; the ranks share its files between them."""
        rank, size = self._world.rank, self._world.size
        _, records = told(
            self._world, lambda: (None, {"faults": disk.faults(path, part=rank, parts=size)})
        )
        return [fault for record in records for fault in record["faults"]]

    def at(self, step: int) -> Path | None:
        """The checkpoint of a step, the same on all ranks; None: there is none.

        Collectives: one agreement.
        """
        path = self.folder / _name(step)
        found = self._told_by_first(lambda: [str(path)] if path.is_dir() else [])
        return path if found else None

    def take(self, engine: Any, step: int, expected: RunState) -> Path:
        """Restore an earlier step of this run.

        Args:
            engine: of the run.
            step: whose checkpoint it is.
            expected: of the run, as of `load`.

        Raises:
            ValueError: on all ranks: it is gone or damaged; names the files.

        Collectives: two agreements, and those of `load`.
        """
        path, there = self.folder / _name(step), self.at(step)
        faults = [f"{path}: it is not there"] if there is None else self._faults(path)
        if faults:
            raise ValueError("\n".join([f"got no whole checkpoint of step {step}:", *faults]))
        self.load(engine, path, expected)
        return path

    def save(self, engine: Any, state: RunState, *, best: int | None = None) -> Path:
        """Write a checkpoint.

        Args:
            engine: DeepSpeed's.
            state: of the run.
            best: the step whose checkpoint is kept, however old.

        Raises:
            SaveError: some rank could not write; on all ranks, with the file and what is missing.

        Collectives: DeepSpeed's, and three agreements.
        """
        name = _name(state.step)
        partial = self.folder / (name + _PARTIAL)
        try:
            together(self._world, lambda: self._prepare(partial))
            with disk.in_place_of_deepspeeds(engine) as written:
                engine.save_checkpoint(
                    str(self.folder),
                    tag=partial.name,
                    save_latest=False,
                    exclude_frozen_parameters=self._only_trained,
                )
            _, records = told(self._world, lambda: self._own_files(engine, partial, state, written))
            known = {n: each for record in records for n, each in record["files"].items()}
            kept = None if best is None else _name(best)
            together(self._world, lambda: self._publish(partial, name, known, kept=kept))
        except ValueError as error:
            if self._world.rank == 0:
                disk.remove([partial])
            last = self.latest
            kept = "no checkpoint was written before" if last is None else f"{last} stays in force"
            raise SaveError(f"{error}; {kept}") from None
        return self.folder / name

    def load(self, engine: Any, path: Path, expected: RunState) -> RunState:
        """Restore weights, optimizer, scheduler and random state.

        Where ranks or ZeRO stage are not those that wrote it, every rank takes its new part
        (`ds_lvx.training.moving`); ranks that were not there take the first one's random state.

        Args:
            engine: made from a config with as many samples a step.
            path: a checkpoint's folder.
            expected: of the run that resumes; its ``step`` and ``samples_seen`` do not matter.

        Returns:
            The state that was saved.

        Raises:
            ValueError: on all ranks: the folder holds no checkpoint, or that of another run; the
                message lists every difference and what to do.
        """
        state = together(self._world, lambda: self._read(path, expected))
        moves = (state.world_size, state.zero_stage) != (expected.world_size, expected.zero_stage)
        if moves:
            states = together(self._world, lambda: self._moved(path, engine, state))
            place_states(states, engine)
        else:
            self._load(engine, path)
        own, first = self._random_file(path), path / "random-0.pt"
        _restore_random(torch.load(own if own.is_file() else first, weights_only=True))
        return state

    def _load(self, engine: Any, path: Path) -> None:
        with disk.in_place_of_deepspeeds(engine, trusted=self._trusted):
            loaded, _ = engine.load_checkpoint(
                str(path.parent), tag=path.name, load_module_strict=not self._only_trained
            )
        if loaded is None:
            raise ValueError(f"{path}: got files that DeepSpeed cannot load; take another one")

    def _moved(self, path: Path, engine: Any, state: RunState) -> States:
        model = engine.module
        order = order_of(model, parameter_groups(model, 0.0))
        try:
            check_target(engine)
            return read_states(
                path, engine, stage=state.zero_stage, trusted=self._trusted, order=order
            )
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"--resume: {error}") from error

    def _prepare(self, partial: Path) -> None:
        if self._world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            disk.remove(self.folder.glob(f"*{_PARTIAL}"))
            partial.mkdir()

    def _own_files(
        self, engine: Any, partial: Path, state: RunState, written: disk.Written
    ) -> tuple[None, dict[str, Any]]:
        """Write what DeepSpeed does not; the sums of this rank's files."""
        if written.error is not None:
            raise written.error
        random_file = self._random_file(partial)
        with disk.explained(random_file):
            self._write_own(partial, state)
            if self._world.rank == 0 and hasattr(engine, "_copy_recovery_script"):
                engine._copy_recovery_script(str(self.folder))
            own = {random_file.name: disk.synced(random_file)}
        return None, {"files": {**written.files, **own}}

    def _write_own(self, partial: Path, state: RunState) -> None:
        torch.save(_random_state(), self._random_file(partial))
        if self._world.rank == 0:
            (partial / _RUN).write_text(json.dumps(asdict(state), indent=2) + "\n")

    def _publish(
        self, partial: Path, name: str, known: Mapping[str, Any], *, kept: str | None
    ) -> None:
        if self._world.rank != 0:
            return
        disk.write_manifest(partial, known)
        target = self.folder / name
        disk.remove([target])
        partial.rename(target)
        disk.sync(self.folder)
        disk.write_text(self.folder / LATEST, name + "\n")
        # Later steps are of a run that this one left behind, and do not count.
        earlier = [old for old in sorted(self.folder.glob("step-*")) if old.name < name]
        old = earlier[: max(len(earlier) + 1 - self._keep, 0)]
        disk.remove(path for path in old if path.name != kept)

    def _read(self, path: Path, expected: RunState) -> RunState:
        try:
            state = RunState(**json.loads((path / _RUN).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"--resume: got {path}, which is no checkpoint of this script ({error}); expected "
                "a folder output_dir/checkpoints/step-...; check the path"
            ) from None
        problems = [
            f"{key}: got {getattr(expected, key)} for a checkpoint with {getattr(state, key)}; {do}"
            for key, do in _SAME.items()
            if getattr(expected, key) != getattr(state, key)
        ]
        if problems:
            raise ValueError("\n".join([f"--resume: {path} is of another run", *problems]))
        own = self._random_file(path)
        if self._world.rank < state.world_size and not own.is_file():
            raise ValueError(f"--resume: got {path} without {own.name}; expected one a rank")
        return state

    def _random_file(self, folder: Path) -> Path:
        return folder / f"random-{self._world.rank}.pt"


def _random_state() -> dict[str, Any]:
    accelerator = get_accelerator()
    on_device = accelerator.device_name() != "cpu"
    return {
        "torch": torch.get_rng_state(),
        "device": accelerator.get_rng_state() if on_device else None,
        "python": random.getstate(),
    }


def _restore_random(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["device"] is not None:
        get_accelerator().set_rng_state(state["device"])
    random.setstate(state["python"])
