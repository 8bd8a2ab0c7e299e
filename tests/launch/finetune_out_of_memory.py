"""`launch/finetune.py`, in which rank `$RUNS_OUT` asks for too much memory in its third step."""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

import torch

from ds_lvx.training.loop import Trainer
from tests.launch.finetune_runs import SCRIPT

TOO_MUCH = 2**46  # bytes: no machine has them


class Hungry:
    """A forward hook that is content with two forwards."""

    def __init__(self) -> None:
        self.forwards = 0

    def __call__(self, *_: Any) -> None:
        self.forwards += 1
        if self.forwards == 3:
            torch.empty(TOO_MUCH, dtype=torch.uint8)


def main() -> None:
    """Run the script; this process is its own, so that its classes may be changed."""
    train = Trainer.train

    def train_hungrily(trainer: Trainer) -> None:
        if os.environ["RANK"] == os.environ["RUNS_OUT"]:
            trainer.engine.module.get_decoder().layers[1].register_forward_hook(Hungry())
        train(trainer)

    Trainer.train = train_hungrily  # type: ignore[method-assign]
    sys.argv[0] = str(SCRIPT)
    runpy.run_path(str(SCRIPT), run_name="__main__")


if __name__ == "__main__":
    main()
