"""What tests of families share whose visual tokens stand among the text's: the same training on
ranks and in one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from ds_lvx import traffic
from ds_lvx.config import LVXConfig
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.models import FAMILIES, patch_model
from ds_lvx.sharding import shard_batch
from ds_lvx.training.export import gather_weights
from ds_lvx.training.model import Source, load_model
from ds_lvx.training.options import parse
from tests.models import mllama_case
from tests.models.mllama_case import (
    assert_same_training,
    plain_step,
    reference_steps,
    sharded_steps,
)
from tests.ranks import run_ranks

METHODS = ("lvx", "ring", "ulysses", "auto")
Make = Callable[..., Any]
Job = tuple[dict[str, Any], Make]
"""A ds_config, and what makes the model."""


def rules(model_type: str, method: str, ranks: int, stage: int = 0) -> dict[str, Any]:
    """`mllama_case.ds_config` for the names of a family: the method of the text's layers."""
    config = mllama_case.ds_config(stage=stage, sp_size=ranks, cross={}, self_attn=method)
    del config["ds_lvx"]["layers"][1]
    patterns = FAMILIES.named(model_type).patterns
    for rule, kind in zip(config["ds_lvx"]["layers"], ("local", "self"), strict=True):
        rule["match"] = patterns[kind]
    return config


def references(
    makes: Sequence[Make], model: Make, own: Callable[[Any], Any] = dict
) -> dict[str, dict[str, Any]]:
    """One step in this process for each kind of batch, by the name of what makes it.

    Args:
        makes: of the batches.
        model: makes it.
        own: what the model's own forward takes of a batch.
    """
    return {make.__name__: reference_steps([[own(make())]], model()) for make in makes}


def step_each(
    model_type: str, model: Make, makes: Sequence[Make], ranks: int, offset: int
) -> list[dict[str, Any]]:
    """One step for each kind of batch, the methods in turn: run it on every rank."""
    return [
        plain_step(rules(model_type, METHODS[(n + offset) % 4], ranks), make(), model=model())
        for n, make in enumerate(makes)
    ]


def check_each(
    model_type: str,
    model: Make,
    makes: Sequence[Make],
    expected: Mapping[str, dict[str, Any]],
    *,
    ranks: int,
    offset: int,
    unused: str = "nothing",
) -> None:
    """Compare `step_each` with `references`: no parameter lacks a gradient where there are images.

    A batch whose name begins with ``text`` has none. No model uses what is named ``unused``.
    """
    results = run_ranks(step_each, ranks, model_type, model, makes, ranks, offset)
    for index, make in enumerate(makes):
        name, mine = make.__name__, [each[index] for each in results]
        try:
            assert_same_training(mine, expected[name], sp_size=ranks)
        except AssertionError as error:
            raise AssertionError(f"{name} on {ranks} ranks: {error}") from error
        missing = {n for each in mine for n in each["missing"] if unused not in n}
        assert name.startswith("text") or missing == set(), name


def train_each(jobs: Sequence[Job], batches: Any) -> list[dict[str, Any]]:
    return [sharded_steps(config, batches, model=make()) for config, make in jobs]


def check(jobs: Sequence[Job], *, ranks: int, batches: Any, sp_size: int) -> None:
    """Compare the training of each job with one process's."""
    results = run_ranks(train_each, ranks, jobs, batches)
    for index, (config, make) in enumerate(jobs):
        alone = make()
        # transformers' own loses gradients of keys that Gemma 4's layers share, where reentrant.
        alone.gradient_checkpointing_disable()
        expected = reference_steps(batches, alone)
        try:
            assert_same_training([each[index] for each in results], expected, sp_size=sp_size)
        except AssertionError as error:
            raise AssertionError(f"job {index}, {config}: {error}") from error


def checkpointed(make: Make, *, reentrant: bool = False) -> Any:
    model = make()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def section(config: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A ds_config with a section ``activation_checkpointing``."""
    return {**config, "activation_checkpointing": settings}


def bytes_of_forward(model_type: str, model: Make, batch: dict[str, Any]) -> int:
    """Bytes that a rank sends in tower, embeddings and logits of a model without layers of text:
    all but attention. Run it on two ranks."""
    made, config = model(num_hidden_layers=0), rules(model_type, "lvx", 2)
    config["ds_lvx"]["layers"].pop()
    groups = SequenceParallelGroups(2)
    patch = patch_model(made, LVXConfig.from_ds_config(config), groups)
    shard = shard_batch(batch, model=made)
    with traffic() as sent:
        made(**shard)
    patch.unpatch()
    groups.close()
    return sent.bytes_sent


def check_saved(
    name: str, model: Any, folder: Path, *, size: str = "16KB"
) -> list[dict[str, Tensor]]:
    """A checkpoint, nearly with an expert a file, is loaded and saved as it is at ZeRO-3 in bf16.

    Args:
        name: of the family.
        model: in bf16.
        folder: an empty one.
        size: of a file, at most.

    Returns:
        The buffers of every rank's engine.
    """
    start, end = folder / "start", folder / "end"
    model.save_pretrained(start, max_shard_size=size)
    names = json.loads((start / "model.safetensors.index.json").read_text())
    assert len({*names["weight_map"].values()}) > 9
    found: list[dict[str, Tensor]] = run_ranks(_load_and_save, 2, name, model.config, start, end)
    with safe_open(end / "model.safetensors", "pt") as saved:
        assert saved.keys() == sorted(names["weight_map"])
    read = type(model).from_pretrained(end, dtype="auto").state_dict()
    expected = model.state_dict()
    assert read.keys() == expected.keys()
    for key, weight in read.items():
        assert weight.dtype == expected[key].dtype, key
        assert torch.equal(weight, expected[key]), key
    return found


def _load_and_save(name: str, model_config: Any, start: Path, end: Path) -> dict[str, Tensor]:
    config = {**rules(name, "lvx", 2, 3), "bf16": {"enabled": True}}
    source = Source(str(start), FAMILIES.named(name), model_config, None)
    needed = ("--data", "none", "--deepspeed_config", "none", "--output_dir", "none")
    options = parse(["--model", str(start), *needed])
    engine = mllama_case.start_engine(config, load_model(options, config, source))
    rank = dist.get_rank()
    held = gather_weights(engine.module, partitioned=True, only_trained=False, keep=rank == 0)
    if rank == 0:
        engine.module.save_pretrained(end, state_dict=held)
    found = {key: buffer.clone() for key, buffer in engine.module.named_buffers()}
    mllama_case.end_engine(engine)
    return found
