"""The command line of `launch/finetune.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ds_lvx.data.chosen import FrameRate
from ds_lvx.data.limits import Limits
from ds_lvx.training import best
from ds_lvx.training.arguments import (
    above,
    add_format,
    add_limits,
    add_load_in_4bit,
    add_rate,
    from_,
    limits_of,
)
from ds_lvx.training.lora import ALL_LINEAR, check_words
from ds_lvx.training.schedule import SCHEDULERS, check_schedule, json_object

_OF_A_NODE = (
    *("model", "data", "eval_data", "media_root", "deepspeed_config", "output_dir", "resume"),
    *("workers", "traceback"),
)
CHECKS = ("lines", "headers", "frames")
ON_BAD_SAMPLE = ("stop", "skip")


@dataclass(frozen=True)
class Options:
    """What the user asked for; `parser` has the meaning of each."""

    model: str
    trust_remote_code: bool
    data: str
    eval_data: str | None
    val_size: float | None
    format: str | None
    media_root: str | None
    fps: float | None
    frames: int | None
    max_frames: int | None
    max_pixels: int
    max_film_frames: int
    max_lead_in_frames: int
    max_gap_s: float
    max_line_bytes: int
    max_length: int | None
    group_by_length: bool
    pack: int | None
    check_data: str
    on_bad_sample: str
    workers: int | None
    deepspeed_config: str
    output_dir: str
    epochs: float
    max_steps: int | None
    learning_rate: float
    lr_scheduler: str
    lr_scheduler_kwargs: dict[str, Any] | None
    min_lr: float | None
    warmup_steps: float
    weight_decay: float
    load_in_4bit: bool
    lora_r: int
    lora_alpha: int | None
    lora_dropout: float
    lora_target_modules: list[str] | None
    lora_modules_to_save: list[str] | None
    freeze_vision: bool
    gradient_checkpointing: bool
    seed: int
    eval_steps: int | None
    eval_generate: int
    eval_new_tokens: int
    load_best_model_at_end: bool
    metric_for_best_model: str | None
    greater_is_better: bool | None
    early_stopping_patience: int | None
    early_stopping_threshold: float | None
    save_steps: int | None
    keep_checkpoints: int
    resume: str | None
    trust_checkpoint: bool
    log_steps: int
    report_to: list[str]
    traceback: bool

    @property
    def limits(self) -> Limits:
        """Of lines, images and videos."""
        return limits_of(self)

    @property
    def shared(self) -> dict[str, Any]:
        """What all ranks must share, by option; files and folders may be elsewhere on a node."""
        values = {name: value for name, value in vars(self).items() if name not in _OF_A_NODE}
        return {f"--{name}": value for name, value in values.items()}

    @property
    def evaluates(self) -> bool:
        """Whether there is something to evaluate on."""
        return self.eval_data is not None or self.val_size is not None


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line.

    Raises:
        SystemExit: with a usage message, for an unknown option or an impossible value.
    """
    top = parser()
    values = vars(top.parse_args(arguments))
    del values["local_rank"]  # from the launcher; the environment says the same
    options = Options(**values)
    try:
        FrameRate.asked(options)
        check_words(options)
        best.check_options(options)
        check_schedule(options)
    except ValueError as error:
        top.error(str(error))
    if options.eval_generate > 0 and not options.evaluates:
        top.error("--eval_generate: got no --eval_data; expected the chats whose answers to give")
    if options.val_size is not None:
        if options.eval_data is not None:
            top.error("--val_size: got it beside --eval_data; expected one of them; drop the other")
        if options.val_size >= 1 and not options.val_size.is_integer():
            top.error(
                f"argument --val_size: got {options.val_size}; expected a whole number, or a share "
                "of the data below 1"
            )
    if options.warmup_steps > 1 and not options.warmup_steps.is_integer():
        top.error(
            f"argument --warmup_steps: got {options.warmup_steps}; expected a whole number, or a "
            "share of all steps below 1"
        )
    if options.on_bad_sample == "skip" and options.check_data == "lines":
        top.error(
            "argument --on_bad_sample: got skip with --check_data lines; expected headers or "
            "frames, which say what to skip; leave --check_data out"
        )
    return options


def parser() -> argparse.ArgumentParser:
    """The parser, with one line of help for each option."""
    top = argparse.ArgumentParser(
        prog="finetune.py",
        description="Fine-tune a model on your own images and videos, with the visual tokens of a "
        "sample split over the ranks of a sequence-parallel group.",
    )
    # DeepSpeed's launcher writes the first form, torch.distributed.launch the second.
    top.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    _add_inputs(top.add_argument_group("model and data"))
    add_limits(top.add_argument_group("limits of the data; what is above is an error"))
    _add_training(top.add_argument_group("training"))
    _add_outputs(top.add_argument_group("output"))
    return top


def _add_inputs(group: Any) -> None:
    group.add_argument(
        "--model",
        required=True,
        help="folder or hub name of a checkpoint; `tiny`: a tiny one with random weights; "
        "`tiny:TYPE`: one of another model_type",
    )
    group.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run code that comes with the checkpoint, for models that transformers has not",
    )
    group.add_argument("--data", required=True, help="chats to train on (docs/data.md)")
    group.add_argument("--eval_data", help="chats to evaluate on")
    group.add_argument(
        "--val_size",
        type=above(float, 0),
        metavar="SAMPLES",
        help="in place of --eval_data: samples of --data that are held out and evaluated on, by "
        "--seed; below 1 a share of them",
    )
    add_format(group)
    add_rate(group)
    group.add_argument(
        "--check_data",
        choices=CHECKS,
        default="headers",
        help="what is looked at in every line before the model is loaded: its text and that its "
        "files exist; their headers and the number of tokens too (default); every frame",
    )
    group.add_argument(
        "--on_bad_sample",
        choices=ON_BAD_SAMPLE,
        default="stop",
        help="a line that cannot serve ends the run (default), or is left out and named at its end",
    )
    group.add_argument(
        "--workers",
        type=from_(int, 0),
        help="processes of a rank that decode ahead of it; 0: in the rank itself (default: 1 with "
        "a GPU, else 0)",
    )
    group.add_argument("--deepspeed_config", required=True, help="a ds_config with `ds_lvx`")


def _add_training(group: Any) -> None:
    group.add_argument(
        "--epochs", type=above(float, 0), default=1.0, help="over the data (default: %(default)s)"
    )
    group.add_argument(
        "--max_steps", type=above(int, 0), help="optimizer steps, in place of --epochs"
    )
    _add_schedule(group)
    group.add_argument(
        "--weight_decay",
        type=from_(float, 0),
        default=0.0,
        help="of matrices; norms, biases and gates do not decay (default: 0)",
    )
    _add_lora(group)
    group.add_argument("--freeze_vision", action="store_true", help="leave the vision tower as is")
    group.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="keep one tensor a layer and compute the rest again in backward",
    )
    group.add_argument(
        "--group_by_length",
        action="store_true",
        help="take samples of about one length at once, text tokens and visual tokens counted",
    )
    group.add_argument(
        "--pack",
        type=above(int, 1),
        metavar="TOKENS",
        help="samples of a forward share rows of text of up to so many tokens, each sees its own",
    )
    group.add_argument(
        "--seed",
        type=from_(int, 0),
        default=0,
        help="of the order of the data, dropout and LoRA (default: 0)",
    )


def _add_schedule(group: Any) -> None:
    group.add_argument(
        "--learning_rate",
        type=above(float, 0),
        default=1e-5,
        help="of AdamW, at its highest (default: %(default)s)",
    )
    group.add_argument(
        "--lr_scheduler", choices=SCHEDULERS, default="cosine", help="default: %(default)s"
    )
    group.add_argument(
        "--lr_scheduler_kwargs",
        type=json_object,
        metavar="JSON",
        help="further words of the schedule, those of transformers' function: "
        """'{"num_cycles": 3}'""",
    )
    group.add_argument(
        "--min_lr",
        type=above(float, 0),
        help="learning rate at the end of a linear, cosine, polynomial or warmup_stable_decay "
        "schedule (default: 0, or what --lr_scheduler_kwargs says)",
    )
    group.add_argument(
        "--warmup_steps",
        type=from_(float, 0),
        default=0.0,
        help="in which the learning rate rises; below 1 a share of all steps (default: 0)",
    )


def _add_lora(group: Any) -> None:
    add_load_in_4bit(group)
    group.add_argument(
        "--lora_r",
        type=from_(int, 0),
        default=0,
        help="rank of LoRA; 0 (default) trains the weights themselves",
    )
    group.add_argument("--lora_alpha", type=above(int, 0), help="default: twice --lora_r")
    group.add_argument(
        "--lora_dropout", type=from_(float, 0), default=0.0, help="of LoRA (default: 0)"
    )
    group.add_argument(
        "--lora_target_modules",
        nargs="+",
        metavar="NAME",
        help="where LoRA acts: names of modules, or their ends; or one regular expression for "
        f"whole names; or {ALL_LINEAR} (default: the projections of the text's attention)",
    )
    group.add_argument(
        "--lora_modules_to_save",
        nargs="+",
        metavar="NAME",
        help="modules that train whole beside LoRA, and are saved with it: names, or their ends",
    )


def _add_outputs(group: Any) -> None:
    group.add_argument("--output_dir", required=True, help="where everything goes, on all nodes")
    group.add_argument("--eval_steps", type=above(int, 0), help="default: only at the end")
    group.add_argument(
        "--eval_generate",
        type=from_(int, 0),
        default=0,
        help="answers to generate at every evaluation, of the first samples; answers.jsonl has "
        "them beside their references (default: 0)",
    )
    group.add_argument(
        "--eval_new_tokens",
        type=above(int, 0),
        default=64,
        help="of each of these answers (default: %(default)s)",
    )
    _add_best(group)
    group.add_argument("--save_steps", type=above(int, 0), help="steps between checkpoints")
    group.add_argument(
        "--keep_checkpoints",
        type=above(int, 0),
        default=2,
        help="older ones are deleted, but for the best (default: %(default)s)",
    )
    group.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        help="go on from the latest checkpoint in --output_dir, from the newest that is whole "
        "(`whole`), from that or from the beginning (`auto`), or from the folder given",
    )
    group.add_argument(
        "--trust_checkpoint",
        action="store_true",
        help="resume from files that hold more than tensors, which runs code of whoever wrote them",
    )
    group.add_argument(
        "--log_steps",
        type=above(int, 0),
        default=1,
        help="steps between lines of metrics.jsonl (default: %(default)s)",
    )
    group.add_argument(
        "--report_to",
        nargs="+",
        default=[],
        metavar="TRACKER",
        help="what else gets the metrics: tensorboard, wandb, trackio and accelerate's others",
    )
    group.add_argument("--traceback", action="store_true", help="show where an error was raised")


def _add_best(group: Any) -> None:
    group.add_argument(
        "--load_best_model_at_end",
        action="store_true",
        help="write a checkpoint of every evaluation that is the best so far, keep it, and end "
        "with the best one's weights",
    )
    group.add_argument(
        "--metric_for_best_model",
        choices=best.NAMES,
        metavar="NAME",
        help=f"what evaluations are compared by: {', '.join(best.METRICS)} (default: eval_loss)",
    )
    group.add_argument(
        "--greater_is_better",
        type=_truth,
        metavar="TRUE_OR_FALSE",
        help="whether the best is the greatest (default: for all but eval_loss)",
    )
    group.add_argument(
        "--early_stopping_patience",
        type=above(int, 0),
        metavar="N",
        help="end the run after N evaluations that are no better than the best before them",
    )
    group.add_argument(
        "--early_stopping_threshold",
        type=from_(float, 0),
        metavar="DIFFERENCE",
        help="by which one has to be better for that (default: 0)",
    )


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected true or false")
    return text.lower() == "true"
