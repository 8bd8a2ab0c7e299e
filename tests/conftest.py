"""What all tests share: the rank processes, what they need built, and skipping without a GPU."""

from __future__ import annotations

import atexit
import gc
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from tests.ranks import MAX_RANKS, ROOT, session_pool

OPERATOR = "deepspeed_shm_comm"
BUILD_S = 900.0
BUILD = "from ds_lvx.distributed.start import init_distributed as start; start(dist_backend='gloo')"

gc.disable()  # until all is imported, of which nothing is garbage
if not torch.cuda.is_available():
    # Read when Triton's kernels are imported: without a GPU they run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Collections look at what tests make, not at every module and test there is."""
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # else libraries say at the end what has leaked


def pytest_sessionstart(session: pytest.Session) -> None:
    """Have DeepSpeed build its operator before any rank starts: it takes a C++ compiler a minute.

    Else several tests would wait for one build, and one that is ended meanwhile leaves a lock.
    """
    if hasattr(session.config, "workerinput") or session.config.option.collectonly:
        return
    folder = Path(cpp_extension._get_build_directory(OPERATOR, verbose=False))
    if (lock := folder / "lock").exists():  # for which every rank would wait without a word
        from ds_lvx.distributed.start import wait_for_build  # imports DeepSpeed

        wait_for_build(lock, timeout_s=BUILD_S)
    if (folder / f"{OPERATOR}.so").exists():
        return
    print("Builds DeepSpeed's operator, once ...", flush=True)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}
    environment = {**os.environ, **place}
    subprocess.run([sys.executable, "-c", BUILD], cwd=ROOT, env=environment, check=False)


@pytest.fixture(scope="session", autouse=True)
def _rank_processes() -> Iterator[None]:
    """End the rank processes with the last test, before pytest-cov adds up their data."""
    yield
    session_pool().discard()


@pytest.fixture(autouse=True)
def _no_group_stays() -> Iterator[None]:
    """A process group that a test makes here is not the next one's."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="also the tests marked exhaustive; a test that is named by its :: always runs",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _leave_out_exhaustive(config, items)
    if hasattr(config, "workerinput"):
        _longest_first(items)
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if present and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1":
        present = MAX_RANKS  # which share what there is
    for item in items:
        several = item.get_closest_marker("gpus")
        needed = several.args[0] if several else int(item.get_closest_marker("gpu") is not None)
        if needed > present:
            reason = "needs a GPU" if needed == 1 else f"needs {needed} GPUs"
            item.add_marker(pytest.mark.skip(reason=reason))


def _leave_out_exhaustive(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.option.exhaustive or "exhaustive" in config.option.markexpr
    if asked or any("::" in word for word in config.args):
        return
    beyond = [item for item in items if item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=beyond)
    items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


def _longest_first(items: list[pytest.Item]) -> None:
    """Files with many slow tests come early: at the end no worker waits for the other's file."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
