"""The learning rate over a run: the schedules of transformers that are functions of the step."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

SCHEDULERS = (
    *("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts"),
    *("polynomial", "inverse_sqrt", "cosine_with_min_lr", "cosine_warmup_with_min_lr"),
    "warmup_stable_decay",
)
# What ends at a learning rate of its own, and by which words; linear and cosine by others like it.
_WITH_FLOOR = {
    "cosine": ("cosine_with_min_lr", "min_lr"),
    "cosine_with_min_lr": ("cosine_with_min_lr", "min_lr"),
    "cosine_warmup_with_min_lr": ("cosine_warmup_with_min_lr", "min_lr"),
    "linear": ("polynomial", "lr_end"),
    "polynomial": ("polynomial", "lr_end"),
    "warmup_stable_decay": ("warmup_stable_decay", "min_lr_ratio"),
}
_FILLED = ("optimizer", "last_epoch", "num_warmup_steps", "num_training_steps")
_TRIED = 100
"""Steps of a run that a schedule is tried with."""


def json_object(text: str) -> dict[str, Any]:
    """A JSON object of the command line.

    Raises:
        ValueError: it is none.
    """
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"got {text!r}; expected a JSON object")
    return found


def check_schedule(options: Any) -> None:
    """Try the schedule that the options ask for.

    Raises:
        ValueError: words that it does not know, or what it says against them.
    """
    low, high, name = options.min_lr, options.learning_rate, options.lr_scheduler
    if low is not None and name not in _WITH_FLOOR:
        raise ValueError(
            f"--min_lr: got {low} for the schedule {name}, which has no such end; expected one of "
            f"{', '.join(_WITH_FLOOR)}; pass --lr_scheduler"
        )
    if low is not None and low >= high:
        raise ValueError(f"--min_lr: got {low}; expected less than --learning_rate, {high}")
    words = options.lr_scheduler_kwargs or {}
    known = _words_of(name if low is None else _WITH_FLOOR[name][0])
    unknown = [word for word in words if word not in known]
    if unknown:
        there = ", ".join(known) if known else "no words"
        raise ValueError(
            f"--lr_scheduler_kwargs: got {unknown[0]!r} for {name}; expected {there}; correct it"
        )
    if low is not None and any(word in words for word in ("min_lr", "min_lr_rate", "lr_end")):
        raise ValueError("--min_lr: got it beside --lr_scheduler_kwargs that say it; drop one")
    weight = torch.zeros(1, requires_grad=True)
    try:
        schedule = make_schedule(options, torch.optim.SGD([weight], lr=high), total=_TRIED)
        rates = [schedule.lr_lambdas[0](step) for step in range(_TRIED)]
        if not all(math.isfinite(rate) for rate in rates):
            raise ValueError(f"it makes a learning rate of {max(rates) * high}")
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"--lr_scheduler {name}: {error}; pass --lr_scheduler_kwargs") from None


def check_section(options: Any, ds_config: Mapping[str, Any]) -> None:
    """Refuse words for a schedule that the ds_config takes the place of.

    Raises:
        ValueError: there is a section ``scheduler``.
    """
    given = [name for name in ("min_lr", "lr_scheduler_kwargs") if getattr(options, name)]
    if given and "scheduler" in ds_config:
        raise ValueError(
            f"--{given[0]}: got a ds_config with a scheduler of its own, which it says nothing to; "
            f"expected none; drop --{given[0]} or the section"
        )


def make_schedule(options: Any, optimizer: Any, *, total: int) -> LambdaLR:
    """The schedule of a run.

    Args:
        options: ``learning_rate``, ``lr_scheduler``, ``lr_scheduler_kwargs``, ``min_lr``,
            ``warmup_steps``.
        optimizer: torch's.
        total: steps of the run.
    """
    from transformers import get_scheduler

    name, words = options.lr_scheduler, dict(options.lr_scheduler_kwargs or {})
    if options.min_lr is not None:
        name, word = _WITH_FLOOR[name]
        highest = optimizer.defaults["lr"] if word == "min_lr_ratio" else 1.0
        words[word] = options.min_lr / highest
    made: LambdaLR = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup_steps(options.warmup_steps, total),
        num_training_steps=total,
        scheduler_specific_kwargs=words,
    )
    return made


def warmup_steps(wanted: float, total: int) -> int:
    """Steps of the warm-up: so many, or below 1 a share of all, as of transformers' Trainer."""
    return int(wanted) if wanted >= 1 else math.ceil(wanted * total)


def _words_of(name: str) -> list[str]:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType

    made_by: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    return [word for word in inspect.signature(made_by).parameters if word not in _FILLED]
