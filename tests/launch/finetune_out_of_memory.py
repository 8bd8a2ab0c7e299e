"""`launch/finetune.py`, in which a rank asks for too much memory in its third step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from ds_lvx.training.loop import Trainer
from tests.launch.finetune_runs import finetune_main

TOO_MUCH = 2**46  # bytes: no machine has them


class Hungry:
    """A forward hook that is content with two forwards."""

    def __init__(self) -> None:
        self.forwards = 0

    def __call__(self, *_: Any) -> None:
        self.forwards += 1
        if self.forwards == 3:
            torch.empty(TOO_MUCH, dtype=torch.uint8)


def hungry(runs_out: int, words: Sequence[str]) -> int:
    """The script's main; this process is its own, so that its classes may be changed."""
    train = Trainer.train

    def train_hungrily(trainer: Trainer) -> None:
        if int(os.environ["RANK"]) == runs_out:
            trainer.engine.module.get_decoder().layers[1].register_forward_hook(Hungry())
        train(trainer)

    Trainer.train = train_hungrily  # type: ignore[method-assign]
    return finetune_main(words)
