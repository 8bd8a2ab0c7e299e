"""Everything a run needs before there is a model: config, data, processor, and the steps to do."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_lvx.config import LVXConfig, read_ds_config
from ds_lvx.data.batch import FrameRate
from ds_lvx.data.chat import Conversation, read_conversations
from ds_lvx.data.text import TextEncoder
from ds_lvx.training.model import Source
from ds_lvx.training.options import Options

DEFAULT_FPS = 1.0


@dataclass(frozen=True)
class BatchSizes:
    """How many samples make a step.

    Attributes:
        micro: samples of one replica in one forward.
        accumulation: forwards of a step.
        replicas: data-parallel size.
    """

    micro: int
    accumulation: int
    replicas: int

    @property
    def per_forward(self) -> int:
        """Samples that all replicas take in at once."""
        return self.micro * self.replicas

    @property
    def per_step(self) -> int:
        """Samples of an optimizer step."""
        return self.per_forward * self.accumulation


@dataclass(frozen=True, eq=False)
class Inputs:
    """What `read_inputs` found.

    Attributes:
        ds_config: the whole config.
        sizes: of batches.
        source: of the model: its family and processor.
        encoder: for its text.
        rate: which frames of a video are taken.
        training, evaluation: the samples; evaluation may be empty.
        total_steps: optimizer steps of the whole run.
        fingerprint: of the training data and of what is taken from it.
    """

    ds_config: dict[str, Any]
    sizes: BatchSizes
    source: Source
    encoder: TextEncoder
    rate: FrameRate
    training: list[Conversation]
    evaluation: list[Conversation]
    total_steps: int
    fingerprint: str


def read_inputs(options: Options, world_size: int) -> Inputs:
    """Read and check what the options name. Communicates with nobody.

    Args:
        options: of the run.
        world_size: ranks.

    Raises:
        ValueError: whatever is wrong with config, data, checkpoint or output folder.
    """
    ds_config = read_ds_config(options.deepspeed_config)
    lvx = LVXConfig.from_ds_config(options.deepspeed_config)
    try:
        lvx.check_world_size(world_size)
    except ValueError as error:
        raise ValueError(f"{options.deepspeed_config}: {error}") from None
    sizes = batch_sizes(ds_config, world_size // lvx.sequence_parallel_size)
    _check_output(options)
    training = read_conversations(options.data)
    evaluation = [] if options.eval_data is None else read_conversations(options.eval_data)
    source = Source.of(options.model)
    encoder = TextEncoder(
        source.processor, source.max_length(options.max_length), family=source.family
    )
    fps = DEFAULT_FPS if options.fps is None and options.frames is None else options.fps
    rate = FrameRate(fps=fps, count=options.frames, max_frames=options.max_frames)
    steps = options.max_steps
    if steps is None:
        steps = max(math.ceil(options.epochs * len(training) / sizes.per_step), 1)
    return Inputs(
        ds_config=ds_config,
        sizes=sizes,
        source=source,
        encoder=encoder,
        rate=rate,
        training=training,
        evaluation=evaluation,
        total_steps=steps,
        fingerprint=_fingerprint(options.data, rate, encoder),
    )


def batch_sizes(ds_config: Mapping[str, Any], replicas: int) -> BatchSizes:
    """Samples a forward and forwards a step, by DeepSpeed's rules.

    Of ``train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x
    replicas`` a config may leave out what the others decide.

    Raises:
        ValueError: the three contradict each other, or none says how large a batch is.
    """
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, accumulation = (ds_config.get(key) for key in keys)
    given = ", ".join(f"{key} {ds_config[key]}" for key in keys if key in ds_config) or "none"
    if micro is None and total is not None:
        accumulation = 1 if accumulation is None else accumulation
        micro = total // (accumulation * replicas)
    elif accumulation is None:
        accumulation = 1 if total is None or not micro else total // (micro * replicas)
    if not micro or not accumulation or total not in (None, micro * accumulation * replicas):
        raise ValueError(
            f"ds_config: got {given} for {replicas} data-parallel replicas; expected "
            "train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x "
            "replicas; leave train_batch_size out"
        )
    return BatchSizes(micro, accumulation, replicas)


def _check_output(options: Options) -> None:
    folder = Path(options.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir: got {folder}, a file; expected a folder; name another")
    if options.resume is None and (folder / "checkpoints" / "latest").is_file():
        raise ValueError(
            f"--output_dir: got {folder}, which holds checkpoints of a run; expected a new folder, "
            "or --resume to go on with that run"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"--output_dir: got {folder}, which cannot be written ({error.strerror}); expected a "
            "folder that can; name another"
        ) from None


def _fingerprint(data: str, rate: FrameRate, encoder: TextEncoder) -> str:
    digest = hashlib.sha256(Path(data).read_bytes())
    digest.update(repr((rate, encoder.max_length)).encode())
    return digest.hexdigest()[:16]
