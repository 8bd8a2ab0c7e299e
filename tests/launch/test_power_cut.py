"""What is on the disk when the power goes, by snapshots of one while checkpoints are written to it.

The disk is a file with a file system in it. What a program has written and not synced is in memory,
and not in that file: a copy of the file is the disk after a power cut.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_lvx.distributed.channel import Channel
from ds_lvx.training.run_state import Checkpoints
from tests.launch.test_finetune_damage import Engine, alone, state_of

SNAPSHOTS = 8
WRITER = """
import sys
from itertools import count
from pathlib import Path
from tests.launch.test_power_cut import save
for step in count(1):
    save(Path(sys.argv[1]), step)
    print("step", step, flush=True)
"""


def save(folder: Path, step: int) -> None:
    """One checkpoint of 2 MiB."""
    alone(folder, keep=2).save(Engine(0), state_of(step))


@contextlib.contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk of 48 MiB."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(48 << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", path], check=True, capture_output=True)
        with mounted(path, tmp_path / "trial"):
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root, mkfs.ext4 and loop devices ({error})")
    return path


def snapshot(image: Path, copy: Path, writer: subprocess.Popen[str]) -> None:
    """The disk as it is now; the writer stands still meanwhile, and so must the kernel."""
    os.kill(writer.pid, signal.SIGSTOP)
    try:
        shutil.copyfile(image, copy)
        while not filecmp.cmp(image, copy, shallow=False):
            shutil.copyfile(image, copy)
    finally:
        os.kill(writer.pid, signal.SIGCONT)


@pytest.mark.exhaustive
def test_after_a_power_cut_there_is_a_whole_checkpoint(image: Path, tmp_path: Path) -> None:
    numbers = random.Random(0)
    copies = []
    with (
        mounted(image, tmp_path / "disk-there") as folder,
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True
        ) as writer,
    ):
        assert writer.stdout is not None
        for number in range(SNAPSHOTS):
            lines = (line.split() for line in writer.stdout)
            done = int(next(words[1] for words in lines if words[0] == "step"))
            time.sleep(numbers.uniform(0.0, 0.1))
            copies.append((done, tmp_path / f"copy-{number}"))
            snapshot(image, copies[-1][1], writer)
        writer.kill()
    for done, copy in copies:
        with mounted(copy, tmp_path / "again") as folder:
            checkpoints = Checkpoints(folder, Channel(None), keep=2, only_trained=False)
            found = checkpoints.find("latest")  # raises where it is not whole
            assert found is not None
            assert int(found.name.removeprefix("step-")) >= done
