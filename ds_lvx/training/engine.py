"""The engine of a run: DeepSpeed's, with AdamW and a schedule of the learning rate."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

import ds_lvx
from ds_lvx.training.inputs import Inputs
from ds_lvx.training.model import parameter_groups
from ds_lvx.training.options import Options
from ds_lvx.training.schedule import make_schedule


def make_engine(model: Any, inputs: Inputs, options: Options) -> Any:
    """The engine, with AdamW and the schedule of the options where the ds_config has none.

    Raises:
        ValueError, NotImplementedError: what ``ds_lvx.initialize`` finds wrong.
    """
    groups = parameter_groups(model, options.weight_decay)
    optimizer = None
    if "optimizer" not in inputs.ds_config:
        optimizer = torch.optim.AdamW(groups, lr=options.learning_rate)

    schedule = partial(make_schedule, options, total=inputs.total_steps)
    engine, *_ = ds_lvx.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=groups,
        lr_scheduler=None if "scheduler" in inputs.ds_config else schedule,
        config=inputs.ds_config,
    )
    return engine


def renew_learning_rate(engine: Any) -> None:
    """After a resume, the learning rate of the schedule as it is now.

    The one restored with the optimizer is that of the schedule as it was: with another
    ``--max_steps`` they differ.
    """
    scheduler = engine.lr_scheduler
    if not isinstance(scheduler, LambdaLR):
        return  # DeepSpeed's own, from the ds_config: of no known length
    for group, base, factor in zip(
        engine.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(scheduler.last_epoch)
