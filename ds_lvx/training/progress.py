"""What a run tells about itself: a progress bar on rank 0 and a line of JSON a step."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

from ds_lvx.models.shares import Share, share_table
from ds_lvx.training.check import listed
from ds_lvx.training.disk import write_text
from ds_lvx.training.trackers import Trackers


class Progress:
    """Progress bar and the run's files of lines and words; silent on all ranks but the first.

    Args:
        folder: where the files are written.
        rank: of this process.
        total_steps: of the run.
        trackers: that are told the same.
    """

    def __init__(
        self, folder: Path, *, rank: int, total_steps: int, trackers: Trackers | None = None
    ) -> None:
        self._folder = folder
        self._file = folder / "metrics.jsonl"
        self._answers = folder / "answers.jsonl"
        self._writes = rank == 0
        self._bar: Any = tqdm(total=total_steps, disable=rank != 0, unit="step", desc="training")
        self._since = time.perf_counter()
        self._tokens = 0
        self._unwritten: list[str] = []
        self._trackers = trackers
        if self._writes:
            folder.mkdir(parents=True, exist_ok=True)

    def start(self, step: int) -> None:
        """Begin at a step: forget what an interrupted run wrote about later ones."""
        if self._writes:
            write_text(self._file, _until(self._file, step))
            if self._answers.is_file():
                write_text(self._answers, _until(self._answers, step))
        self._bar.update(step)
        self._since, self._tokens = time.perf_counter(), 0

    def advance(self, tokens: int) -> None:
        """One step is done; it took in so many tokens, text and visual, of all replicas."""
        self._bar.update()
        self._tokens += tokens

    def log(self, **values: float) -> None:
        """Show and write values of a step, with tokens a second since the last time, and memory.

        Args:
            values: ``step`` among them.
        """
        seconds = time.perf_counter() - self._since
        row: dict[str, float] = {
            **values,
            "tokens_per_second": round(self._tokens / max(seconds, 1e-9), 1),
            "memory_gib": round(peak_memory_bytes() / 2**30, 3),
        }
        self._write(row)
        self._bar.set_postfix_str(
            f"loss {values['loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s, "
            f"{row['memory_gib']:.2f} GiB"
        )
        self._since, self._tokens = time.perf_counter(), 0

    def log_evaluation(self, **values: float) -> None:
        """Write the values of an evaluation; its time does not count as training."""
        self._write(values)
        self.say(", ".join(f"{key} {value:.6g}" for key, value in values.items()))
        self._since, self._tokens = time.perf_counter(), 0

    def log_shares(self, step: int, found: Sequence[Share]) -> None:
        """Show and write what each rank holds of a batch; the last is what one rank would."""
        *ranks, alone = map(asdict, found)
        self._write({"step": step, "ranks": ranks, "one_rank": alone})
        self.say(f"ds_lvx: the first batch\n{share_table(found)}")
        self.text("first batch", share_table(found), step=step)

    def text(self, name: str, text: str, *, step: int = 0) -> None:
        """Tell trackers something that is no number; in a fixed width."""
        lines = "".join(f"    {line}\n" for line in text.splitlines())
        self._report({name: lines, "step": step})

    def answers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add the answers of an evaluation to ``answers.jsonl``."""
        if not self._writes or not rows:
            return
        text = "".join(json.dumps({"step": step, **row}) + "\n" for row in rows)
        try:
            with self._answers.open("a") as file:
                file.write(text)
        except OSError as error:
            self.say(f"warning: {self._answers}: {error.strerror}; these answers are not kept")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._writes:
            self._bar.write(text)

    def skipped(self, problems: Sequence[str]) -> None:
        """Count and name the samples that were left out; ``skipped.txt`` has all of them."""
        if not self._writes or not problems:
            return
        self.say("\n".join([f"skipped {len(problems)} bad samples", listed(problems)]))
        with contextlib.suppress(OSError):  # what ended the run is to be said, not this
            text = "".join(f"{problem}\n" for problem in problems)
            (self._folder / "skipped.txt").write_text(text, "utf-8", "backslashreplace")

    def close(self) -> None:
        """Leave the bar as it stands, and end the trackers."""
        self._bar.close()
        if self._trackers is not None:
            self._trackers.finish()

    def _write(self, row: dict[str, Any]) -> None:
        if not self._writes:
            return
        self._report(row)
        self._unwritten.append(json.dumps(row) + "\n")
        try:
            with self._file.open("a") as file:
                file.write("".join(self._unwritten))
        except OSError as error:
            if len(self._unwritten) == 1:
                self.say(
                    f"warning: {self._file}: {error.strerror}; its lines are kept until it can be "
                    "written again"
                )
        else:
            self._unwritten.clear()

    def _report(self, row: Mapping[str, Any]) -> None:
        for problem in [] if self._trackers is None else self._trackers.log(row):
            self.say(f"warning: {problem}; training goes on")


def _until(file: Path, step: int) -> str:
    """The lines of a file that are not of later steps than this one."""
    rows = file.read_text().splitlines() if file.is_file() and step else []
    return "".join(row + "\n" for row in rows if _step_of(row) <= step)


def _step_of(row: str) -> float:
    """The step of a line of metrics; beyond all steps for one that was cut off when a run ended."""
    try:
        return float(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def peak_memory_bytes() -> int:
    """The most memory in use so far: the accelerator's, or the process's where there is none."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return int(accelerator.max_memory_allocated())
