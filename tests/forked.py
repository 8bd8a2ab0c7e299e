"""Modules on forked ranks, for tests of what `ds_lvx.compare.harness` starts from nothing."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import IO

import pytest

from ds_lvx.compare import harness
from tests.ranks import FORKED


class Popen:
    """`subprocess.Popen` for ``python -m MODULE ARGUMENTS``, as far as `harness` uses it."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], stdout: IO[str], stderr: int
    ) -> None:
        assert (command[:2], stderr) == ([sys.executable, "-m"], subprocess.STDOUT)
        given = (list(command[2:]), dict(env), stdout.name)
        self._process = FORKED.Process(target=_module, args=given)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def kill(self) -> None:
        if self._process.exitcode is None and self._process.pid is not None:
            os.kill(self._process.pid, signal.SIGKILL)


def fork_fresh_ranks(patch: pytest.MonkeyPatch) -> None:
    """What `harness` starts is forked, with the imports of `tests.preloaded`."""
    patch.setattr(harness, "subprocess", SimpleNamespace(Popen=Popen, STDOUT=subprocess.STDOUT))


def _module(arguments: Sequence[str], environment: Mapping[str, str], output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(arguments)
    # Where it was imported before, its functions are found under that name all the same.
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
