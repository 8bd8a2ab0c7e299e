"""Everything a run needs before there is a model: config, data, processor, and the steps to do."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ds_lvx.config import LVXConfig, by_path, check_ds_config, read_ds_config
from ds_lvx.data.batch import FrameRate
from ds_lvx.data.chat import Chats
from ds_lvx.data.extras import need
from ds_lvx.data.text import TextEncoder
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.together import together
from ds_lvx.models.contract import Family
from ds_lvx.models.registry import check_packs
from ds_lvx.training import quantized
from ds_lvx.training.asking import check_asked
from ds_lvx.training.check import Checks, bad_samples
from ds_lvx.training.lengths import sample_lengths, sample_media
from ds_lvx.training.model import Source
from ds_lvx.training.options import Options
from ds_lvx.training.run_state import AUTO, written
from ds_lvx.training.schedule import check_section
from ds_lvx.training.trackers import check_trackers


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
        checks: what a sample has to pass.
        training: the samples.
        evaluation: the samples to evaluate on, or None.
        total_steps: optimizer steps of the whole run.
        fingerprint: of the training data and of what is taken from it.
        skipped: what is wrong with the samples that are left out.
        lengths: of the training samples, where they are grouped by them.
        media: of the training samples, a number for each set of media, where those that share one
            are taken together.
        shares_prefixes: samples of a micro-batch that begin alike share it.
    """

    ds_config: dict[str, Any]
    sizes: BatchSizes
    source: Source
    encoder: TextEncoder
    rate: FrameRate
    checks: Checks
    training: Chats
    evaluation: Chats | None
    total_steps: int
    fingerprint: str
    skipped: tuple[str, ...]
    lengths: Sequence[int] | None = None
    media: Sequence[int] | None = None
    shares_prefixes: bool = False


def read_inputs(options: Options, world_size: int) -> Inputs:
    """Read and check what the options name, all but the samples. Communicates with nobody.

    Args:
        options: of the run.
        world_size: ranks.

    Raises:
        ValueError: whatever is wrong with config, data, checkpoint or output folder.
        NotImplementedError: samples that begin alike are to share it, of a model that cannot.
    """
    ds_config = read_ds_config(options.deepspeed_config)
    lvx = LVXConfig.from_ds_config(options.deepspeed_config)
    try:
        lvx.check_world_size(world_size)
        check_ds_config(ds_config, lvx.sequence_parallel_size)
    except ValueError as error:
        raise ValueError(f"{options.deepspeed_config}: {error}") from None
    check_section(options, ds_config)
    sizes = batch_sizes(ds_config, world_size // lvx.sequence_parallel_size)
    check_trackers(options.report_to)
    if options.lora_r > 0:
        need("peft", "lora", why="--lora_r")
    _check_output(options)
    opened = partial(
        Chats, limits=options.limits, format=options.format, media_root=options.media_root
    )
    training = opened(options.data)
    evaluation = None if options.eval_data is None else opened(options.eval_data)
    source = Source.of(options.model, trust_remote_code=options.trust_remote_code)
    quantized.check(options, source.config)
    _check_trains(options, source)
    source.check_tokenizer()
    if options.pack is not None:
        _check_pack(sizes, source.family)
    if lvx.share_prefixes:
        _check_shares(sizes, source.family, options)
    if options.eval_generate > 0 and not source.family.has("generator"):
        raise source.family.lacks("generator", "--eval_generate")
    encoder = TextEncoder(
        source.processor, source.max_length(options.max_length), family=source.family
    )
    rate = FrameRate.asked(options)
    checks = Checks(
        level=options.check_data,
        model=options.model,
        trust_remote_code=options.trust_remote_code,
        max_length=encoder.max_length,
        min_tokens=lvx.sequence_parallel_size,
        rate=rate,
        limits=options.limits,
    )
    return Inputs(
        ds_config=ds_config,
        sizes=sizes,
        source=source,
        encoder=encoder,
        rate=rate,
        checks=checks,
        training=training,
        evaluation=evaluation,
        total_steps=_total_steps(options, sizes, training),
        fingerprint=_fingerprint(
            training, (), rate, encoder, options=options, by_media=lvx.share_prefixes
        ),
        skipped=(),
        shares_prefixes=lvx.share_prefixes,
    )


def check_samples(inputs: Inputs, options: Options, world: Channel) -> Inputs:
    """Look at every sample (`bad_samples`), and leave out what is bad where the options say so;
    hold out what is evaluated on, and find the lengths or the media that samples are grouped by.

    Raises:
        ValueError: on all ranks: options, ds_configs or data that differ between them, a bad
            sample, none that is good, or more to hold out than there are.

    Collectives: an agreement on the control plane, two for each file of data, one for what
    ``--eval_generate`` asks, one for lengths or media.
    """
    opened = {"--data": inputs.training, "--eval_data": inputs.evaluation}
    contents = {
        f"contents of {name}": None if chats is None else chats.lines.sha256
        for name, chats in opened.items()
    }
    asked = {**options.shared, **by_path(inputs.ds_config), **contents}
    world.agree_on(asked, what="finetune.py")
    skip = options.on_bad_sample == "skip"
    look = partial(bad_samples, checks=inputs.checks, source=inputs.source, world=world, skip=skip)
    bad = look(inputs.training)
    for doubt in inputs.encoder.doubts() if world.rank == 0 else ():
        print(f"ds_lvx: warning: --model {options.model}: {doubt}", flush=True)
    training, evaluation, bad_too = inputs.training.without(bad), inputs.evaluation, {}
    if evaluation is not None:
        bad_too = look(evaluation)
        evaluation = evaluation.without(bad_too)
    elif options.val_size is not None:
        evaluation, training = training.split(options.val_size, seed=options.seed)
        if world.rank == 0:
            print(f"ds_lvx: {len(evaluation):,} samples are held out (--val_size)", flush=True)
    if evaluation is not None:
        together(world, partial(_check_asked, evaluation, options.eval_generate))
    lengths = media = None
    if options.group_by_length:
        lengths = sample_lengths(training, inputs.checks, inputs.source, world=world)
    if inputs.shares_prefixes:
        media = sample_media(training, world=world)
    return replace(
        inputs,
        training=training,
        evaluation=evaluation,
        total_steps=_total_steps(options, inputs.sizes, training),
        fingerprint=_fingerprint(
            training,
            sorted(bad),
            inputs.rate,
            inputs.encoder,
            options=options,
            by_media=inputs.shares_prefixes,
        ),
        skipped=(*bad.values(), *bad_too.values()),
        lengths=lengths,
        media=media,
    )


def _check_trains(options: Options, source: Source) -> None:
    """Raise a ValueError for quantized weights that are to train."""
    if source.is_packed and options.lora_r == 0:
        raise ValueError(
            f"--model: got {options.model}, whose weights are quantized and do not train; expected "
            "LoRA beside them: --lora_r 8; or the checkpoint that it was made of"
        )


def _check_pack(sizes: BatchSizes, family: Family) -> None:
    check_packs(family, "--pack")
    if sizes.micro == 1:
        raise ValueError(
            "--pack: got train_micro_batch_size_per_gpu 1 in the ds_config; expected 2 or more: "
            "the samples of one forward share rows; raise it, or leave --pack out"
        )


def _check_shares(sizes: BatchSizes, family: Family, options: Options) -> None:
    got = f"{options.deepspeed_config}: ds_lvx.share_prefixes: got true"
    if not family.shares_prefixes:
        raise NotImplementedError(
            f"{got} for a model of type {family.model_type!r}; expected false: it does not take "
            "samples that begin alike as one"
        )
    given = {"--pack": options.pack is not None, "--group_by_length": options.group_by_length}
    other = next((name for name, is_given in given.items() if is_given), None)
    if other is not None:
        raise ValueError(
            f"{got} and {other}; expected one of them: samples with the same media are taken "
            f"together, and share a row; leave {other} out"
        )
    if sizes.micro == 1:
        raise ValueError(
            f"{got} with train_micro_batch_size_per_gpu 1; expected 2 or more: the samples of one "
            "forward share what they begin with; raise it, or set share_prefixes to false"
        )


def _check_asked(evaluation: Chats, count: int) -> None:
    for index in range(min(count, len(evaluation))):
        check_asked(evaluation[index])


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
    kinds = {"checkpoints": written(folder / "checkpoints"), "the model": folder.glob("model/*")}
    holds = next((kind for kind, files in kinds.items() if any(files)), None)
    is_over = options.resume == AUTO and holds == "the model"  # and nothing to go on from
    if holds is not None and (options.resume is None or is_over):
        raise ValueError(
            f"--output_dir: got {folder}, which holds {holds} of a run; expected a new folder"
            + ("" if is_over else ", or --resume to go on with that run")
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"--output_dir: got {folder}, which cannot be written ({error.strerror}); expected a "
            "folder that can; name another"
        ) from None


def _total_steps(options: Options, sizes: BatchSizes, training: Chats) -> int:
    if options.max_steps is not None:
        return options.max_steps
    return max(math.ceil(options.epochs * len(training) / sizes.per_step), 1)


def _fingerprint(
    training: Chats,
    left_out: Sequence[int],
    rate: FrameRate,
    encoder: TextEncoder,
    *,
    options: Options,
    by_media: bool,
) -> str:
    taken: tuple[object, ...] = (training.lines.sha256, list(left_out), rate, encoder.max_length)
    if training.format != "messages":
        taken = (*taken, training.format)
    if options.group_by_length:
        taken = (*taken, "grouped by length")
    if by_media:
        taken = (*taken, "grouped by media")
    if options.val_size is not None:
        taken = (*taken, "held out", options.val_size)
    return hashlib.sha256(repr(taken).encode()).hexdigest()[:16]
