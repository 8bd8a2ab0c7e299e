"""The command ``ds-lvx``: each subcommand is a module with ``add_arguments`` and ``run``."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Sequence
from importlib import import_module

from ds_lvx.data.errors import print_any_name

COMMANDS: dict[str, tuple[str, str]] = {
    "compare": (
        "ds_lvx.compare.command",
        "measure the methods side by side, on your shapes and network",
    ),
    "data": (
        "ds_lvx.training.data_command",
        "look at a data set: what is in it, what would fail, what is learnt",
    ),
    "doctor": (
        "ds_lvx.doctor.command",
        "what this machine has, and whether attention is exact on it",
    ),
    "merge": (
        "ds_lvx.training.merging",
        "fold a LoRA adapter into its base",
    ),
    "parity": (
        "ds_lvx.training.parity",
        "train your model on your data, sharded and in one process, and compare",
    ),
    "plan": (
        "ds_lvx.plan.command",
        "predict time, bytes and memory of a training step on any cluster",
    ),
}
"""Module and one line of help, by the name of the subcommand."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; its exit status. What is wrong with a user's input, or with a file that
    cannot be read or written, ends it in one line."""
    print_any_name()
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="ds-lvx", description="Long visual inputs in DeepSpeed")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, text) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text)
        if words[:1] == [name]:  # the others' imports can wait
            import_module(module).add_arguments(subparser)
    options = parser.parse_args(words)
    command = import_module(COMMANDS[options.command][0])
    try:
        status = int(command.run(options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _reader_left():
            raise
        return 1
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"ds-lvx {options.command}: {error}", file=sys.stderr)
        return 2


def _reader_left() -> bool:
    """Whether nobody reads what is printed any more (``| head``); then the rest goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # what has gone is told unasked
    if poll.poll(0):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
