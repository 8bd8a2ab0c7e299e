"""Which kernel was fastest on a card, by kind of problem, as ``ds-lvx doctor --tune`` measured it.

A small file a card in the cache folder, with the versions in its name: a driver, PyTorch or Triton
of another version is another table. Nothing is written in a training step.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ds_lvx import cache
from ds_lvx.kernels import flash
from ds_lvx.kernels.interface import Problem, Upstream

_PACKAGES = ("ds_lvx", "torch", "triton")


class Table:
    """What was measured on one device.

    Args:
        name: of the file in the cache folder.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._entries: dict[str, dict[str, Any]] = dict(cache.read(name))

    @property
    def path(self) -> Path:
        """The file; it may not exist yet."""
        return cache.folder() / self.name

    def entries(self) -> Mapping[str, Mapping[str, Any]]:
        """``{kind: {"chosen": name, "seconds": {name: s}, "excluded": {name: reason}}}``."""
        return self._entries

    def add(self, kind: str, entry: dict[str, Any]) -> None:
        """Keep an entry in the place of an older one."""
        self._entries = cache.update(self.name, lambda held: {**held, kind: entry})

    def ignored(self) -> list[Path]:
        """Tables of other cards or other versions, where this one holds nothing."""
        return [] if self._entries else self._others

    @functools.cached_property
    def _others(self) -> list[Path]:
        found = sorted(cache.folder().glob("kernels-*.json"))
        return [path for path in found if path.name != self.name]


def kind_of(problem: Problem, upstream: Upstream | None) -> str:
    """The row of the table for a problem; lengths count by powers of two."""
    batch, seqlen_q, heads, head_dim = problem.q.shape
    seqlen_kv, kv_heads = problem.k.shape[1:3]
    parts = [
        "forward" if upstream is None else "backward",
        str(problem.q.dtype).removeprefix("torch."),
        f"head_dim {head_dim}",
        f"{heads // kv_heads} query heads a kv head",
        f"{_power(batch * kv_heads)} kv heads in all",
        f"{_power(seqlen_q)} queries",
        f"{_power(seqlen_kv)} keys",
    ]
    if problem.rule is not None:
        parts.append(f"visibility {problem.rule.structure}")
    if upstream is not None and upstream.has_dlse:
        parts.append("dlse")
    return ", ".join(parts)


def _power(length: int) -> int:
    """The power of two at or above."""
    return 1 << max(length - 1, 0).bit_length()


@functools.cache
def table_of(device: torch.device) -> Table:
    """The table of a CUDA device, under these versions."""
    name = torch.cuda.get_device_name(device)
    versions = [*map(_version, _PACKAGES), torch.version.cuda, torch.backends.cudnn.version()]
    # A FlashAttention that has taken the place of PyTorch's own has a table of its own.
    versions += filter(None, [flash.version_in_place()])
    key = hashlib.sha256(repr([name, versions]).encode()).hexdigest()[:12]
    slug = "-".join(name.lower().split())
    return Table(f"kernels-{slug}-{key}.json")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
