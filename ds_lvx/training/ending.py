"""Requests to end a run: a scheduler's signals, and a launcher that has gone.

Slurm, Kubernetes and cloud machines announce the end by SIGTERM, Slurm also by the signal that
``--signal`` names. DeepSpeed's launcher passes SIGTERM on to its ranks where it gets the signal
itself; its outer process (``deepspeed``) does not, and its ranks would train on without it.
"""

from __future__ import annotations

import contextlib
import signal
from types import FrameType, TracebackType
from typing import Any

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# How the words of a rank's parent and of that one's end: `python -m deepspeed.launcher.launch ...`
# under `python .../bin/deepspeed ...`, or `python .../bin/torchrun ...` alone.
_LAUNCHERS = (
    (
        *("deepspeed.launcher.launch", "launcher/launch.py"),
        *("/torchrun", "torch.distributed.run", "distributed/run.py"),
        *("/accelerate", "accelerate.commands.launch", "commands/launch.py"),
    ),
    ("/deepspeed", "/ds", "deepspeed.launcher.runner", "launcher/runner.py"),
)


class EndAskedError(Exception):
    """The run is to end before its last step.

    Attributes:
        reason: why.
        exit_code: as a shell has it for the signal.
    """

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.exit_code = exit_code


class Ending:
    """Notices requests while the context is open; in the main thread.

    After a run that has ended as it should, to its last step or as it was asked, the signals are
    ignored for as long as the process lasts: the run is saved, and a process that dies on its way
    out fails the job and takes other ranks along. After an error they act as before.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._launchers = _launchers()

    def __enter__(self) -> Ending:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        ends_well = kind is None or issubclass(kind, EndAskedError)
        for number, handler in self._before.items():
            # Ignored by the kernel: a handler of Python's is gone before the interpreter is.
            signal.signal(number, signal.SIG_IGN if ends_well else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)

    def asked(self) -> dict[str, Any]:
        """A record for the other ranks: empty, or ``end``, why and with which exit code."""
        if self._signal is not None:
            return {"end": [f"got {self._signal.name}", 128 + self._signal]}
        gone = next((each for each in self._launchers if not each.is_running()), None)
        if gone is not None:
            return {"end": [f"the launcher, process {gone.pid}, has ended", 128 + signal.SIGTERM]}
        return {}


def raise_if_asked(records: list[dict[str, Any]]) -> None:
    """On all ranks alike.

    Args:
        records: of all ranks, with what `Ending.asked` returned in them.

    Raises:
        EndAskedError: some rank was asked to end.
    """
    for rank, record in enumerate(records):
        if "end" in record:
            reason, exit_code = record["end"]
            raise EndAskedError(f"rank {rank} {reason}", exit_code)


def _launchers() -> list[psutil.Process]:
    """The processes of DeepSpeed's launcher above this one, the nearest first."""
    found: list[psutil.Process] = []
    for each, names in zip(psutil.Process().parents(), _LAUNCHERS, strict=False):
        with contextlib.suppress(psutil.Error):
            if any(word.endswith(names) for word in each.cmdline()[:4]):
                found.append(each)
                continue
        break
    return found
