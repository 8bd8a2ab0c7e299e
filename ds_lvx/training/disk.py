"""Files that are whole when they have their name, and checkpoints that are looked at before use.

A file's contents reach the disk when the file is synced, its name when its folder is. Whatever is
written here is synced before it is renamed, so that a power cut leaves the old or the new.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils._pytree import tree_leaves

MANIFEST = "manifest.json"


def sync(path: Path) -> None:
    """Bring a file's contents, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file that has its old contents or the new ones, whatever happens.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def summed(path: Path) -> dict[str, Any]:
    """Size and checksum of a file: ``bytes`` and ``sha256``, as ``sha256sum`` has it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def write_manifest(folder: Path, known: Mapping[str, Any]) -> None:
    """Sync the files of a folder, and list them with their sums.

    Args:
        folder: everything in it belongs to it.
        known: sums that are known already, by name.
    """
    names = sorted(path.name for path in folder.iterdir())
    rest = {name: synced(folder / name) for name in names if name not in known}
    files = {**known, **rest}
    write_text(folder / MANIFEST, json.dumps({"files": files}, indent=1, sort_keys=True) + "\n")


def synced(path: Path) -> dict[str, Any]:
    """`sync` a file; its sums."""
    sync(path)
    return summed(path)


@contextmanager
def explained(path: Path, needed: int = 0) -> Iterator[None]:
    """Let what goes wrong in writing say the file, and what room there is.

    Args:
        path: the file.
        needed: bytes of it.

    Raises:
        OSError: in the place of any other, and of the errors of PyTorch's and safetensors' writers.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        room = ""
        with suppress(OSError):
            free = shutil.disk_usage(path.parent).free
            room = f" ({_mib(needed)} to write, {_mib(free)} free on its disk)"
        raise OSError(f"{path}: {reason}{room}") from error


def faults(folder: Path, *, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a folder, by its manifest; empty where nothing is.

    Args:
        folder: of a checkpoint.
        part, parts: look at every ``parts``-th file only, from the ``part``-th on.
    """
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text())["files"]
    except FileNotFoundError:
        return [f"{path}: not there"] if part == 0 else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{path}: cannot be read ({error})"] if part == 0 else []
    found = []
    for name in sorted(files)[part::parts]:
        fault = _fault(folder / name, files[name])
        found += [] if fault is None else [f"{folder / name}: {fault}"]
    return found


def _fault(path: Path, expected: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{size} bytes; expected {expected['bytes']}"
        if summed(path) != expected:
            return f"its contents have changed (expected sha256 {expected['sha256']})"
    except FileNotFoundError:
        return "not there"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


class Written:
    """Stands in the place of DeepSpeed's checkpoint engine, and notes what it writes.

    A rank that raised in the middle of DeepSpeed's saving would leave the others waiting: what goes
    wrong is kept for afterwards.

    Args:
        own: DeepSpeed's, which does the work.
        trusted: load files that hold other objects than tensors and what DeepSpeed is known to
            put beside them; such a file runs code of whoever wrote it.

    Attributes:
        files: of this rank, with their sums.
        error: what went wrong first.
    """

    def __init__(self, own: Any, *, trusted: bool = False) -> None:
        self.files: dict[str, Any] = {}
        self.error: OSError | None = None
        self._own = own
        self._trusted = trusted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def save(self, state_dict: Any, path: str) -> None:
        """Write and sync a file."""
        if self.error is not None:
            return
        needed = sum(leaf.nbytes for leaf in tree_leaves(state_dict) if isinstance(leaf, Tensor))
        try:
            with explained(Path(path), needed):
                self._own.save(state_dict, path)
                self.files[Path(path).name] = synced(Path(path))
        except OSError as error:
            self.error = error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file, and run no code that it holds.

        Raises:
            ValueError: it holds objects that nobody here has put there.
        """
        if self._trusted:
            return self._own.load(path, map_location)
        return read(Path(path), map_location=map_location)


def read(
    path: Path, *, map_location: Any = "cpu", trusted: bool = False, mmap: bool = False
) -> Any:
    """What a file of a checkpoint holds; of one that is not trusted tensors and plain values alone.

    Args:
        path: of the file.
        map_location: as of ``torch.load``.
        trusted: run code that the file holds.
        mmap: map the file, and read of it what is used.

    Raises:
        ValueError: it holds objects that nobody here has put there.
    """
    try:
        with torch.serialization.safe_globals(_of_deepspeed()):
            return torch.load(path, map_location=map_location, weights_only=not trusted, mmap=mmap)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = "other objects" if named is None else f"an object of {named[1]}"
        raise ValueError(
            f"{path}: got {what}; expected tensors and plain values: loading others runs code "
            "of whoever wrote the file; if you trust it, pass --trust_checkpoint to "
            "launch/finetune.py, or resume a Trainer at the ranks and the stage that saved it"
        ) from None


@contextmanager
def in_place_of_deepspeeds(engine: Any, *, trusted: bool = False) -> Iterator[Written]:
    """Let a `Written` do the engine's reading and writing.

    DeepSpeed's two scripts, which rank 0 copies in the middle of saving, are left for afterwards:
    ``engine._copy_recovery_script(folder)``.
    """
    own = getattr(engine, "checkpoint_engine", None)
    written = Written(own, trusted=trusted)
    engine.checkpoint_engine = written
    engine._copy_recovery_script = lambda folder: None
    try:
        yield written
    finally:
        engine.checkpoint_engine = own
        del engine._copy_recovery_script


def _of_deepspeed() -> list[Any]:
    """What DeepSpeed puts into its files beside tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    return [*known, (_member, "builtins.getattr")]


def _member(of: Any, name: str) -> Any:
    """What ``getattr`` does in a file: Python 3.11.0 to 3.11.3 write members of an enum by it.

    Raises:
        pickle.UnpicklingError: it is asked for anything else.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    if of is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise pickle.UnpicklingError("GLOBAL builtins.getattr")
    return ZeroStageEnum[name]


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def remove(paths: Iterable[Path]) -> None:
    """Delete folders; what cannot be deleted stays."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
