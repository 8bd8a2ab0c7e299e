"""Checkpoints to resume from: all or nothing on the disk, and only by a run that goes on the same.

    output_dir/checkpoints/step-00000020/    DeepSpeed's files, run.json, random-<rank>.pt
    output_dir/checkpoints/latest            "step-00000020"

A checkpoint is written under another name and renamed when all ranks are done; ``latest`` changes
last. Whatever breaks in between leaves the one before as it was. The folder must be shared by all
nodes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from ds_lvx.distributed.channel import Channel
from ds_lvx.training.together import together

_PARTIAL = ".partial"
_RUN = "run.json"
_LATEST = "latest"
# What must be the same in the run that resumes, and what to do where it is not.
_SAME = {
    "world_size": "start as many processes",
    "sequence_parallel_size": "set ds_lvx.sequence_parallel_size to it",
    "zero_stage": "set zero_optimization.stage to it",
    "samples_per_step": "set the batch size and gradient accumulation of the ds_config to it",
    "seed": "pass it as --seed",
    "data": "give the same --data, --fps or --frames; to go on with other data, start a new run "
    "with --model output_dir/model",
    "trained": "give the same --model, --lora_r and --freeze_vision",
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


class Checkpoints:
    """The checkpoints of one output folder.

    Args:
        folder: ``output_dir/checkpoints``.
        world: all ranks.
        keep: how many to keep.
        only_trained: leave frozen weights out, which the model brings along (LoRA).
    """

    def __init__(self, folder: Path, world: Channel, *, keep: int, only_trained: bool) -> None:
        self.folder = folder
        self._world = world
        self._keep = keep
        self._only_trained = only_trained

    @property
    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        pointer = self.folder / _LATEST
        return self.folder / pointer.read_text().strip() if pointer.is_file() else None

    def save(self, engine: Any, state: RunState) -> Path:
        """Write a checkpoint.

        Raises:
            ValueError, RuntimeError: some rank could not write; on all ranks.

        Collectives: DeepSpeed's, and three agreements.
        """
        name = f"step-{state.step:08d}"
        partial = self.folder / (name + _PARTIAL)
        together(self._world, lambda: self._prepare(partial))
        engine.save_checkpoint(
            str(self.folder),
            tag=partial.name,
            save_latest=False,
            exclude_frozen_parameters=self._only_trained,
        )
        together(self._world, lambda: self._write_own(partial, state))
        together(self._world, lambda: self._publish(partial, name))
        return self.folder / name

    def load(self, engine: Any, path: Path, expected: RunState) -> RunState:
        """Restore weights, optimizer, scheduler and random state.

        Args:
            engine: made from the same config.
            path: a checkpoint's folder.
            expected: of the run that resumes; its ``step`` and ``samples_seen`` do not matter.

        Returns:
            The state that was saved.

        Raises:
            ValueError: on all ranks: the folder holds no checkpoint, or that of another run; the
                message lists every difference and what to do.
        """
        state = together(self._world, lambda: self._read(path, expected))
        loaded, _ = engine.load_checkpoint(
            str(path.parent), tag=path.name, load_module_strict=not self._only_trained
        )
        if loaded is None:
            raise ValueError(f"{path}: got files that DeepSpeed cannot load; take another one")
        _restore_random(torch.load(self._random_file(path), weights_only=True))
        return state

    def _prepare(self, partial: Path) -> None:
        if self._world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob(f"*{_PARTIAL}"):
                shutil.rmtree(left_over)

    def _write_own(self, partial: Path, state: RunState) -> None:
        torch.save(_random_state(), self._random_file(partial))
        if self._world.rank == 0:
            (partial / _RUN).write_text(json.dumps(asdict(state), indent=2) + "\n")

    def _publish(self, partial: Path, name: str) -> None:
        if self._world.rank != 0:
            return
        target = self.folder / name
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        pointer = self.folder / (_LATEST + _PARTIAL)
        pointer.write_text(name + "\n")
        os.replace(pointer, self.folder / _LATEST)
        # Later steps are of a run that this one left behind, and do not count.
        earlier = [old for old in sorted(self.folder.glob("step-*")) if old.name < name]
        for old in earlier[: max(len(earlier) + 1 - self._keep, 0)]:
            shutil.rmtree(old)

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
        if not self._random_file(path).is_file():
            raise ValueError(
                f"--resume: got {path} without {self._random_file(path).name}; expected one a rank"
            )
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
