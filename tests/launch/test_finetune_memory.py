"""A run of which one rank has too little memory: how it ends, with nobody's help."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.data.media import chat, write_image, write_jsonl
from tests.launch.finetune_out_of_memory import hungry
from tests.launch.finetune_runs import arguments, finetune, write_config
from tests.launch.forked_runs import Run
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow
SIZE = r"65,536\.00 GiB \(70,368,744,177,664 bytes\)"


def words(folder: Path) -> Sequence[str]:
    write_image(folder / "a.png")
    return arguments(
        model="tiny",
        data=write_jsonl(folder / "train.jsonl", chat(("image", "a.png"))),
        deepspeed_config=write_config(folder / "ds.json", stage=2),
        output_dir=folder / "out",
        max_steps=3,
        save_steps=2,
    )


def said(rank: int, runs_out: int) -> str:
    what = rf"rank {runs_out} \(.*\) ran out of memory in forward: asked for {SIZE} on cpu"
    return rf"\[rank {rank}\] error: {what}"


@pytest.mark.parametrize("runs_out", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_every_rank_ends_with_a_line_and_without_help(tmp_path: Path, runs_out: int) -> None:
    """Rank 0 takes the job's store with it when it ends; what it said arrives all the same."""
    given = words(tmp_path)
    run = Run(given, ranks=2, folder=tmp_path, main=partial(hungry, runs_out))
    assert run.end(launcher=False) == [1, 1], run.output()
    for rank, log in enumerate(run.logs):
        printed = log.read_text()
        assert "Traceback" not in printed, printed
        last = printed.rstrip().splitlines()[-1]
        assert re.match(said(rank, runs_out), last), printed
        assert ("docs/memory.md" in last) == (rank == runs_out), last
    # The checkpoint written before is whole: a run with enough memory goes on from it.
    checkpoints = tmp_path / "out" / "checkpoints"
    assert (checkpoints / "latest").read_text() == "step-00000002\n"
    run_ranks(finetune, 2, *given, "--resume")
    assert (tmp_path / "out" / "model" / "config.json").is_file()
