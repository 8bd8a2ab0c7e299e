"""Checkpoints that move: a run goes on with other ranks, or at another ZeRO stage.

DeepSpeed cuts weights and optimizer states over the ranks that wrote a checkpoint. Here each is put
together again by the name of its parameter, and every rank takes its part of it. As DeepSpeed's
universal checkpoint does, but nothing is converted on disk, stages 0 to 3 go into each other, and
files are read as tensors alone; they are mapped, so that no rank holds them whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    FP32_FLAT_GROUPS,
    LOSS_SCALER,
    OPTIMIZER_STATE_DICT,
    PARAM_GROUPS,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from torch import Tensor, nn

from ds_lvx.training.disk import read

WEIGHT = "weight"
_STEP = "step"
_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")


@dataclass(frozen=True)
class States:
    """A checkpoint's weights and optimizer states, put together on demand.

    Attributes:
        pieces: of each parameter, by name: what a rank had of it, in the order of ranks, flat: by
            `WEIGHT`, or the optimizer's own words. Together they are the parameter, and padding.
        step: of the optimizer.
        groups: the optimizer's settings, a parameter group each.
        common: the rest: schedule and counts.
        scaler: of the loss, or None.
    """

    pieces: Mapping[str, Sequence[Mapping[str, Tensor]]]
    step: float
    groups: Sequence[Mapping[str, Any]]
    common: Mapping[str, Any]
    scaler: Any

    @property
    def words(self) -> list[str]:
        """What there is of a parameter."""
        return list(next(iter(self.pieces.values()))[0])

    def whole(self, name: str, word: str, numel: int) -> Tensor:
        """A parameter's weight or state, fp32 ``[numel]``, on the CPU."""
        return torch.cat([piece[word].flatten() for piece in self.pieces[name]])[:numel]


def order_of(model: nn.Module, groups: Iterable[Any]) -> list[str]:
    """Names of the parameters of an optimizer's groups, or of a list of them, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    given = [each["params"] if isinstance(each, Mapping) else [each] for each in groups]
    return [names[id(parameter)] for group in given for parameter in group]


def read_states(
    folder: Path, engine: Any, *, stage: int, trusted: bool, order: Sequence[str]
) -> States:
    """What a checkpoint holds.

    Args:
        folder: of the checkpoint.
        engine: that is to go on: names and order of what trains are those of the run that wrote.
        stage: ZeRO stage of that run.
        trusted: files may hold other objects than tensors.
        order: names of what trains, as the groups of the optimizer have it at stage 0.

    Raises:
        ValueError: the files are not of this kind, or are not those of this model.
    """
    named = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    try:
        if stage == 0:
            states = _of_stage_0(folder, order, trusted=trusted)
        else:
            states = _of_shards(folder, stage=stage, trusted=trusted)
        missing = sorted(set(named) - set(states.pieces))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"got {folder}, whose optimizer states are not of a kind that moves to other ranks or "
            f"to another ZeRO stage ({type(error).__name__}: {error}); expected those of AdamW at "
            "ZeRO 1 to 3, or in fp32 at ZeRO 0; resume with the ranks and the stage that wrote it"
        ) from error
    if missing:
        raise ValueError(
            f"got {folder} without {missing[0]} and {len(missing) - 1} more parameters "
            "that train here; expected a checkpoint of the same model"
        )
    return states


def place_states(states: States, engine: Any) -> None:
    """Give this rank its part of the states.

    Raises:
        NotImplementedError: an optimizer that these states cannot be given to.

    Collectives: at stages 1 and 2 an all-gather of the weights, at 3 of those that stay whole.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        optimizer.checkpoint_event_prologue()
        _place_at_3(states, optimizer)
        optimizer.checkpoint_event_epilogue()
    elif engine.zero_optimization_stage() > 0:
        _place_at_1(states, optimizer)
        optimizer.update_lp_params()
    else:
        _place_at_0(states, engine)
    for group, saved in zip(optimizer.param_groups, states.groups, strict=True):
        group |= {key: value for key, value in saved.items() if key not in ("params", _STEP)}
        if _STEP in group:  # of an optimizer that counts by group
            group[_STEP] = int(states.step)
    if states.scaler is not None and getattr(optimizer, LOSS_SCALER, None) is not None:
        optimizer.loss_scaler = states.scaler
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(states.common["lr_scheduler"])
    for key in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, key, states.common[key])


def check_target(engine: Any) -> None:
    """Refuse an engine whose optimizer states cannot be placed.

    Raises:
        NotImplementedError: says which.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    holds = {0: "state", 3: "fp32_partitioned_groups_flat"}
    is_known = hasattr(optimizer, holds.get(stage, "single_partition_of_fp32_groups"))
    if stage == 0:
        is_known = is_known and isinstance(optimizer, torch.optim.Optimizer)
    if not is_known or getattr(optimizer, "swap_optimizer", False):
        raise NotImplementedError(
            f"got a checkpoint of other ranks or another ZeRO stage for "
            f"{type(optimizer).__name__} at stage {stage}; expected ZeRO 1 to 3 without NVMe, or "
            "fp32 at stage 0; change zero_optimization, or resume as the checkpoint was written"
        )


# --------------------------------------------------------------------------------------------
# Reading


def _of_stage_0(folder: Path, order: Sequence[str], *, trusted: bool) -> States:
    saved = read(folder / "mp_rank_00_model_states.pt", trusted=trusted, mmap=True)
    optimizer = saved["optimizer"]
    pieces, step = {}, 0.0
    for number, name in enumerate(order):
        state = optimizer["state"][number]
        step = float(state.get(_STEP, step))
        words = {key: value for key, value in state.items() if key != _STEP}
        pieces[name] = [{WEIGHT: saved["module"][name], **words}]
    return States(pieces, step, optimizer[PARAM_GROUPS], saved, None)


def _of_shards(folder: Path, *, stage: int, trusted: bool) -> States:
    found = [(_RANK.search(path.name), path) for path in folder.glob("*_optim_states.pt")]
    paths = sorted((int(match[1]), path) for match, path in found if match is not None)
    shards = [read(path, trusted=trusted, mmap=True)[OPTIMIZER_STATE_DICT] for _, path in paths]
    inner = OPTIMIZER_STATE_DICT if stage == 3 else BASE_OPTIMIZER_STATE
    common = read(sorted(folder.glob("*_model_states.pt"))[0], trusted=trusted, mmap=True)
    pieces: dict[str, list[dict[str, Tensor]]] = {}
    step = 0.0
    for shard in shards:
        optimizer = shard[inner]
        weights = shard[FP32_FLAT_GROUPS if stage == 3 else SINGLE_PARTITION_OF_FP32_GROUPS]
        for number, flat in enumerate(weights):
            state = optimizer["state"][number]
            step = float(state.get(_STEP, optimizer[PARAM_GROUPS][0].get(_STEP, step)))
            words = {WEIGHT: flat, **{k: v for k, v in state.items() if k != _STEP}}
            if stage == 3:
                places = _places_at_3(common[PARAM_SHAPES][number], len(shards))
            else:
                places = _places_at_1(shard[PARAM_SLICE_MAPPINGS][number])
            for name, start, numel in places:
                part = {word: value.narrow(0, start, numel) for word, value in words.items()}
                pieces.setdefault(name, []).append(part)
    first = shards[0]
    return States(pieces, step, first[inner][PARAM_GROUPS], common, first.get(LOSS_SCALER))


def _places_at_1(mappings: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    for name, place in mappings.items():
        yield name, place.start, place.numel


def _places_at_3(shapes: Mapping[str, Any], ranks: int) -> Iterator[tuple[str, int, int]]:
    start = 0
    for name, shape in shapes.items():
        numel = -(-shape.numel() // ranks)
        yield name, start, numel
        start += numel


# --------------------------------------------------------------------------------------------
# Placing


def _place_at_0(states: States, engine: Any) -> None:
    optimizer = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        state = {}
        for word in states.words:
            value = states.whole(name, word, parameter.numel()).view(parameter.shape)
            if word == WEIGHT:
                parameter.data.copy_(value)
            else:
                state[word] = value.to(parameter.device, copy=True)
        optimizer.state[parameter] = {**state, **_step_of(optimizer, states)}


def _place_at_1(states: States, optimizer: Any) -> None:
    for flat, group in zip(
        optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True
    ):
        parts = []
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:  # something of it is this rank's
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                name = optimizer.param_names[parameter]
                parts.append((name, parameter.numel(), here.start, there.start, there.numel))
        _fill(states, optimizer.optimizer, flat, parts)


def _place_at_3(states: States, optimizer: Any) -> None:
    for number, group in enumerate(optimizer.fp16_groups):
        flat, parts, offset = optimizer.fp32_partitioned_groups_flat[number], [], 0
        for parameter in group:
            numel = parameter.partition_numel()
            start = numel * optimizer._get_param_partition_rank(parameter)
            taken = min(max(parameter.ds_numel - start, 0), numel)  # the last one has padding
            if taken > 0:
                name = optimizer.param_names[parameter]
                parts.append((name, parameter.ds_numel, start, offset, taken))
            offset += numel
        _fill(states, optimizer.optimizer, flat, parts)
        optimizer.fp16_partitioned_groups_flat[number].data.copy_(flat.data)
        partitions = optimizer.fp16_partitioned_groups[number]
        updated = optimizer.unflatten(optimizer.fp16_partitioned_groups_flat[number], partitions)
        for partition, value in zip(partitions, updated, strict=True):
            partition.data = value.data


def _fill(
    states: States, optimizer: Any, flat: Tensor, parts: Sequence[tuple[str, int, int, int, int]]
) -> None:
    """Fill this rank's partition of a group, and the optimizer's states of it.

    Args:
        states: of the checkpoint.
        optimizer: torch's.
        flat: the partition.
        parts: name and elements of a parameter, where this rank's part begins in it, and in the
            partition, and how long it is.
    """
    state: dict[str, Any] = {word: torch.zeros_like(flat.data) for word in states.words}
    for name, whole, start, offset, numel in parts:
        for word, filled in state.items():
            value = states.whole(name, word, whole)
            filled.narrow(0, offset, numel).copy_(value.narrow(0, start, numel))
    flat.data.copy_(state.pop(WEIGHT))
    optimizer.state[flat] = {**state, **_step_of(optimizer, states)}


def _step_of(optimizer: Any, states: States) -> dict[str, Any]:
    """The count of steps as an optimizer keeps it beside its states."""
    if any(_STEP in group for group in optimizer.param_groups):
        return {}
    is_torchs = type(optimizer).__module__.startswith("torch.")
    return {_STEP: torch.tensor(states.step) if is_torchs else int(states.step)}
