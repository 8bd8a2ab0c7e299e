"""Starting ``torch.distributed`` by way of DeepSpeed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import deepspeed
from torch.utils.cpp_extension import get_default_build_root


def init_distributed(**arguments: Any) -> None:
    """``deepspeed.init_distributed`` that does not wait for a process which is gone.

    On CPUs DeepSpeed builds an operator at its first start, and loads it at every other. PyTorch
    guards both with a file; a process that is killed in there leaves the file behind, and whoever
    comes next waits for it forever, without a word. Such files are removed first.

    Args:
        arguments: as of ``deepspeed.init_distributed``.

    Collectives: the rendezvous of all ranks, unless ``torch.distributed`` runs already.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    remove_stale_locks(Path(root))
    deepspeed.init_distributed(**arguments)


def remove_stale_locks(root: Path) -> list[Path]:
    """Remove the locks of PyTorch's extension builds that no process of this machine holds open.

    Args:
        root: the folder of the builds; need not exist.

    Returns:
        What was removed. A machine without ``/proc`` keeps all its locks.
    """
    locks = [lock for pattern in ("*/lock", "*/*/lock") for lock in root.glob(pattern)]
    if not locks or not Path("/proc/self/fd").exists():
        return []
    held = _open_files()
    stale = [lock for lock in locks if str(lock.resolve()) not in held]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def _open_files() -> set[str]:
    held = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            held.add(os.readlink(descriptor))
        except OSError:  # closed meanwhile, or another user's, who has builds of his own
            continue
    return held
