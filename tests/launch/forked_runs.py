"""Scripts on ranks that are forked, and so start in no time; what starts and ends them is ours."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.launch.finetune_runs import finetune_main
from tests.ranks import FORKED

# Against hangs alone.
_END_S = 600.0
# Between asking a rank to end and ending it; short, as a scheduler's may be.
_GRACE_S = 5.0


@dataclass(frozen=True)
class Kill:
    """What is done to a run.

    Attributes:
        victim: the rank.
        signal: that it gets.
        after_s: seconds from the start of the run.
    """

    victim: int
    signal: signal.Signals
    after_s: float

    @classmethod
    def at_random(cls, numbers: random.Random, *, ranks: int, within_s: float) -> Kill:
        ending = numbers.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM))
        return cls(numbers.randrange(ranks), ending, numbers.uniform(0.0, within_s))


def _rank(
    main: Callable[[Sequence[str]], int],
    rank: int,
    size: int,
    port: int,
    log: str,
    words: Sequence[str],
) -> None:
    """In a rank: a script's main, as a launcher starts it."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    sys.exit(main(words))


class Run:
    """Ranks of a run, and a launcher that ends them all when one fails.

    Args:
        words: of the command line.
        ranks: how many.
        folder: for what they print.
        main: of the script.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        ranks: int,
        folder: Path,
        main: Callable[[Sequence[str]], int] = finetune_main,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = _free_port()
        self.logs = [folder / f"log-{rank}" for rank in range(ranks)]
        self.processes: list[BaseProcess] = [
            FORKED.Process(target=_rank, args=(main, rank, ranks, self.port, str(log), words))
            for rank, log in enumerate(self.logs)
        ]
        self.began, self.started = time.time(), time.monotonic()
        for process in self.processes:
            process.start()

    def end(self, kill: Kill | None = None, *, launcher: bool = True) -> list[int | None]:
        """Wait for the end; the exit codes by rank. All ranks are gone then.

        Without a launcher nobody ends one rank because of another.
        """
        struck = kill is None
        deadline = self.started + _END_S
        while any(process.is_alive() for process in self.processes):
            age = time.monotonic() - self.started
            if not struck and kill is not None and age > kill.after_s:
                struck = True
                self._strike(kill)
            if launcher and any(process.exitcode not in (None, 0) for process in self.processes):
                self._end_all()
            if time.monotonic() > deadline:
                self._end_all()
                raise TimeoutError(f"still running: {self.output()}")
            time.sleep(0.02)
        return [process.exitcode for process in self.processes]

    def took_s(self, out: Path) -> float:
        """From the start until the last checkpoint was written."""
        times = [path.stat().st_mtime for path in (out / "checkpoints").glob("step-*")]
        return max(times) - self.began

    def output(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def _strike(self, kill: Kill) -> None:
        pid = self.processes[kill.victim].pid
        if pid is None or not self.processes[kill.victim].is_alive():
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, kill.signal)
        if kill.signal == signal.SIGSTOP:  # a node that hangs, until somebody ends the job
            time.sleep(0.5)
            self._end_all(at_once=True)

    def _end_all(self, *, at_once: bool = False) -> None:
        """As launchers do: ask, wait, and end."""
        for process in self.processes:
            if process.is_alive() and not at_once:
                process.terminate()
        deadline = time.monotonic() + (0 if at_once else _GRACE_S)
        while time.monotonic() < deadline and any(p.is_alive() for p in self.processes):
            time.sleep(0.02)
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
