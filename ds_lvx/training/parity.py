"""``ds-lvx parity``: your model on your data, sharded over ranks and in one process."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

import ds_lvx
from ds_lvx.compare.harness import Ranks, RunError, on_ranks
from ds_lvx.config import LVXConfig, read_ds_config
from ds_lvx.config.ds_config import SECTION
from ds_lvx.config.words import in_ranks
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.start import init_distributed, take_device
from ds_lvx.models.precision import training_dtype
from ds_lvx.models.shares import Share, share_table
from ds_lvx.training.batches import Batches
from ds_lvx.training.engine import make_engine
from ds_lvx.training.inputs import batch_sizes, check_samples, read_inputs
from ds_lvx.training.loop import Trainer
from ds_lvx.training.model import Source, load_model
from ds_lvx.training.options import Options, parse

_LEARNING_RATE = "1e-4"
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
_METHODS = {"local": "none", "cross": "lvx", "self": "ulysses"}
_VALUES = ("loss", "grad_norm")
_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``ds-lvx parity``."""
    add = parser.add_argument
    add("--model", required=True, help="folder or hub name of a checkpoint, or `tiny`")
    add("--data", required=True, help="what launch/finetune.py takes as --data")
    add("--deepspeed_config", help="default: ZeRO 2, fp32, lvx and Ulysses over all ranks")
    add("--ranks", type=int, default=2, help="processes that share the work (default: %(default)s)")
    add("--steps", type=int, default=2, help="optimizer steps (default: %(default)s)")
    add("--tolerance", type=float, help="relative (default: 1e-4; of 16 bits 2e-2)")
    add("--timeout", type=float, default=3600.0, metavar="SECONDS", help="for each of the two runs")
    add("options", nargs="*", help="after --: further options of launch/finetune.py")


def run(options: argparse.Namespace) -> int:
    """Train twice, compare, and print; 0, or 1 where the two differ or one failed.

    Raises:
        ValueError: numbers that are none, or a config that does not fit.
    """
    for name in ("ranks", "steps", "timeout"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name}: got {getattr(options, name)}; expected more than 0")
    trusts = "--trust_remote_code" in options.options
    config = _config(options, trusts=trusts)
    size = LVXConfig.from_ds_config(config)
    size.check_world_size(options.ranks)
    replicas = options.ranks // size.sequence_parallel_size
    tolerance = options.tolerance
    if tolerance is None:
        tolerance = _TOLERANCES[training_dtype(config)]
    try:
        sharded = _train(options, config, ranks=options.ranks)
        alone = _train(options, alone_config(config, replicas), ranks=1, apart=True)
    except RunError as error:
        print(f"ds-lvx parity: {error}", file=sys.stderr)
        return 1
    worst = _show(sharded, alone, ranks=options.ranks)
    is_same = worst <= tolerance
    verdict = "the same" if is_same else "NOT the same"
    print(f"{verdict}: they differ by {worst:.1e} of the value at most (tolerance {tolerance:g})")
    return 0 if is_same else 1


def alone_config(config: Mapping[str, Any], replicas: int) -> dict[str, Any]:
    """The config by which one process takes the same steps, one replica's forward after another,
    on the same samples."""
    sizes = batch_sizes(config, replicas)
    rest = {key: value for key, value in config.items() if key not in _BATCH_KEYS}
    order = {
        key: value for key, value in config.get(SECTION, {}).items() if key == "share_prefixes"
    }
    return {
        **rest,
        "train_micro_batch_size_per_gpu": sizes.micro,
        "gradient_accumulation_steps": sizes.accumulation * replicas,
        SECTION: {"sequence_parallel_size": 1, **order},
    }


def _config(options: argparse.Namespace, *, trusts: bool) -> dict[str, Any]:
    if options.deepspeed_config is not None:
        return read_ds_config(options.deepspeed_config)
    family = Source.of(options.model, trust_remote_code=trusts).family
    rules = [
        {"match": pattern, "method": _METHODS[kind]} for kind, pattern in family.patterns.items()
    ]
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 2},
        SECTION: {"sequence_parallel_size": options.ranks, "layers": rules},
    }


def _train(
    options: argparse.Namespace, config: Mapping[str, Any], *, ranks: int, apart: bool = False
) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` of a run.

    Args:
        options, config: of the run.
        ranks: of the run.
        apart: samples that may share prefixes have rows of their own.

    Raises:
        ValueError: what launch/finetune.py would say of the options, the model or the data.
        RunError: a rank failed otherwise.
    """
    accelerators = get_accelerator().device_count()
    on_cpu = get_accelerator().device_name() == "cpu" or accelerators < options.ranks
    print(f"training on {ranks} {'rank' if ranks == 1 else 'ranks'} ...", flush=True)
    with tempfile.TemporaryDirectory(prefix="ds_lvx_parity_") as name:
        path = Path(name, "ds_config.json")
        path.write_text(json.dumps(config))
        words = [
            *("--learning_rate", _LEARNING_RATE, *options.options),
            *("--model", options.model, "--data", options.data),
            *("--deepspeed_config", str(path), "--output_dir", str(Path(name, "out"))),
            *("--max_steps", str(options.steps), "--log_steps", "1"),
        ]
        told = parse(words)
        if told.report_to:
            raise ValueError(
                f"--report_to: got {' '.join(told.report_to)} for runs of which only the "
                "comparison stays; expected none; leave it out"
            )
        read_inputs(told, ranks)  # a mistake shows here, not in a rank
        device = "cpu" if on_cpu else get_accelerator().device_name()
        where = Ranks(ranks, device=device, timeout_s=options.timeout)
        found: dict[str, Any] = on_ranks(_metrics, (words, apart), where)[0]
    if "error" in found:
        raise ValueError(found["error"])
    rows: list[dict[str, Any]] = found["rows"]
    return rows


class _Unsaved(Trainer):
    """A run of which nothing but its metrics is wanted."""

    def export(self) -> None:
        return


def _metrics(request: tuple[Sequence[str], bool]) -> dict[str, Any]:
    """In a rank: train; ``rows`` of ``metrics.jsonl``, or the ``error`` of what the user gave."""
    try:
        return {"rows": _rows(*request)}
    except (ValueError, NotImplementedError) as error:
        return {"error": str(error)}


def _rows(words: Sequence[str], apart: bool) -> list[dict[str, Any]]:
    """Train, and return what ``metrics.jsonl`` has."""
    options: Options = parse(words)
    options.limits.tell_pil()
    take_device()
    init_distributed()
    world, engine = Channel.world(), None
    try:
        inputs = check_samples(read_inputs(options, world.size), options, world)
        inputs = replace(inputs, shares_prefixes=inputs.shares_prefixes and not apart)
        with Batches(inputs, options, world) as batches:
            model = load_model(options, inputs.ds_config, inputs.source)
            engine = make_engine(model, inputs, options)
            del model
            _Unsaved(engine, inputs, options, batches=batches, world=world).run()
    finally:
        ds_lvx.shutdown(engine)
    rows = Path(options.output_dir, "metrics.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows] if os.environ["RANK"] == "0" else []


def _show(
    sharded: Sequence[Mapping[str, Any]], alone: Sequence[Mapping[str, Any]], *, ranks: int
) -> float:
    """Print the two runs side by side; their largest difference, relative."""
    first = next(row for row in sharded if "ranks" in row)
    print(share_table([Share(**row) for row in (*first["ranks"], first["one_rank"])]))
    print(f"{'':16}{in_ranks(ranks):>14}{'one process':>14}{'difference':>14}")
    worst = 0.0
    for row, other in zip(
        *([r for r in rows if "loss" in r] for rows in (sharded, alone)), strict=True
    ):
        for name in _VALUES:
            if name not in row or name not in other:
                continue
            got, expected = row[name], other[name]
            difference = abs(got - expected) / max(abs(expected), 1e-12)
            worst = max(worst, difference)
            label = f"step {row['step']:<3}{name}"
            print(f"{label:16}{got:14.6f}{expected:14.6f}{difference:14.1e}")
    return worst
