"""Checkpoints of accelerate and transformers' Trainer, for other ranks or another ZeRO stage.

DeepSpeed wrote them, a part of weights and optimizer states a rank; `ds_lvx.training.moving` puts
them together again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_lvx.config.ds_config import SECTION
from ds_lvx.distributed.together import together
from ds_lvx.training.disk import read
from ds_lvx.training.moving import States, check_target, place_states, read_states

_ARGUMENT = "resume_from_checkpoint"


def take_others(engine: Any, order: Sequence[str]) -> None:
    """Let ``engine.load_checkpoint`` take checkpoints of other ranks and ZeRO stages as well.

    Args:
        engine: of `ds_lvx.initialize`.
        order: `ds_lvx.training.moving.order_of` the optimizer's groups as they were given to it.
    """
    own = engine.load_checkpoint
    engine.load_checkpoint = functools.partial(_load, engine, own, tuple(order))


def _load(
    engine: Any,
    own: Callable[..., Any],
    order: Sequence[str],
    load_dir: Any,
    tag: str | None = None,
    **how: Any,
) -> Any:
    """DeepSpeed's, or where ranks or stage are not those that wrote, of what moves.

    Raises:
        ValueError: on all ranks: as many samples a step are not taken, or the files are no others
            than DeepSpeed's own for the ranks that wrote them.
        NotImplementedError: as of `ds_lvx.training.moving.check_target`.

    Collectives: two agreements, and those of `place_states`.
    """
    world = engine.ds_lvx.groups.world_channel
    found = together(world, lambda: _found(Path(load_dir), tag))
    if found is None or how.get("load_module_only"):
        return own(load_dir, tag=tag, **how)
    folder, saved = found
    stage = _stage(saved["ds_config"])
    moves = (saved["dp_world_size"], stage) != (world.size, engine.zero_optimization_stage())
    regroups = _sp_size(saved["ds_config"]) != engine.ds_lvx.groups.sp_size
    if not moves and not regroups:
        return own(load_dir, tag=tag, **how)

    def states() -> States | None:
        _check_samples(engine, saved)
        if not moves:
            return None
        try:
            check_target(engine)
            return read_states(folder, engine, stage=stage, trusted=False, order=order)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{_ARGUMENT}: {error}") from error

    there = together(world, states)
    if there is None:
        return own(load_dir, tag=tag, **how)
    place_states(there, engine)
    return str(folder), {}


def _found(load_dir: Path, tag: str | None) -> tuple[Path, Mapping[str, Any]] | None:
    """A checkpoint's folder and what DeepSpeed says of it; None: DeepSpeed is to say what it is."""
    pointer = load_dir / "latest"
    if tag is None and not pointer.is_file():
        return None
    folder = load_dir / (pointer.read_text().strip() if tag is None else tag)
    files = sorted(folder.glob("*_model_states.pt"))
    try:
        return (folder, read(files[0], mmap=True)) if files else None
    except ValueError:  # it holds objects of a script's own, which DeepSpeed itself reads
        return None


def _stage(ds_config: Mapping[str, Any]) -> int:
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def _sp_size(ds_config: Mapping[str, Any]) -> int:
    return int(ds_config.get(SECTION, {}).get("sequence_parallel_size", 1))


def _check_samples(engine: Any, saved: Mapping[str, Any]) -> None:
    """Raise a ValueError where another number of samples makes a step: the data would not go on."""
    steps, taken = int(saved["global_steps"]), int(saved["global_samples"])
    before, now = taken // max(steps, 1), int(engine.train_batch_size())
    if before != now:
        replicas = engine.ds_lvx.groups.dp_size
        raise ValueError(
            f"{_ARGUMENT}: got {now} samples a step for a checkpoint with {before}; expected as "
            "many: set per_device_train_batch_size and gradient_accumulation_steps so that, times "
            f"{replicas} replica{'s' if replicas > 1 else ''}, they make it"
        )
