"""The words of the ``ds_lvx`` section: methods, schedules and kernels, what each can do, and where
it is.

One table each. Whatever depends on a property (which schedule can take keys in chunks, which kernel
does which dtype) asks here; nothing is imported until it is used. A new one is its own file and one
row below.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

AUTO = "auto"
FLOATS = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Entry:
    """A word that the config knows.

    Attributes:
        name: the word.
        path: ``module:name`` of what it stands for; empty where nothing runs.
    """

    name: str
    path: str

    def load(self) -> Any:
        """What it stands for."""
        return loaded(self.path)


def loaded(path: str) -> Any:
    """What a ``module:name`` stands for."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class Method(Entry):
    """Who computes an attention layer over a sequence that is split.

    Attributes:
        has_schedules: the order in which it sends can be chosen.
        recomputes: it can project K and V again in backward.
        splits_heads: it needs a query head a rank at least.
        distributed: it serves a sequence that is split.
        subgroups: it splits heads inside subgroups, and runs another method across them.
    """

    has_schedules: bool = False
    recomputes: bool = False
    splits_heads: bool = False
    distributed: bool = True
    subgroups: bool = False


@dataclass(frozen=True)
class Schedule(Entry):
    """How lvx moves queries.

    Attributes:
        takes_chunks: all queries are on a rank at once, so that K and V may come in chunks.
        same_queries: every rank holds the same queries, and none moves.
    """

    takes_chunks: bool = True
    same_queries: bool = False


@dataclass(frozen=True)
class Kernel(Entry):
    """Who computes one block on one device. ``path`` is a class.

    Attributes:
        dtypes: of q, k and v.
        head_dims: the least and the largest; None where any does.
        for_speed: ``auto`` may take it.
        obstacle: ``module:name`` of a function that says why it cannot do queries like some q, or
            that it can (None); empty where dtypes and head_dims say all.
        package: what else has to be installed; empty: nothing.
    """

    dtypes: tuple[str, ...] = FLOATS
    head_dims: tuple[int, int] | None = None
    for_speed: bool = True
    obstacle: str = ""
    package: str = ""


METHODS: dict[str, Method] = {
    entry.name: entry
    for entry in (
        Method("lvx", "ds_lvx.attention.lvx:attend", has_schedules=True, recomputes=True),
        Method("ring", "ds_lvx.attention.ring:attend"),
        Method("ulysses", "ds_lvx.attention.ulysses:attend", splits_heads=True),
        Method(
            "hybrid",
            "ds_lvx.attention.hybrid:attend",
            has_schedules=True,
            splits_heads=True,
            subgroups=True,
        ),
        Method("none", "", distributed=False),
    )
}

SCHEDULES: dict[str, Schedule] = {
    entry.name: entry
    for entry in (
        # The ring wants K and V whole for every query shard that passes.
        Schedule("ring", "ds_lvx.attention.schedules.ring:Ring", takes_chunks=False),
        Schedule("gather", "ds_lvx.attention.schedules.gather:Gather"),
        Schedule(
            "replicated", "ds_lvx.attention.schedules.replicated:Replicated", same_queries=True
        ),
    )
}

SHARDED = tuple(sorted(name for name, entry in SCHEDULES.items() if not entry.same_queries))
"""Schedules of queries that are split."""

KERNELS: dict[str, Kernel] = {
    entry.name: entry
    for entry in (
        Kernel("native", "ds_lvx.kernels.native:NativeKernel"),
        Kernel(
            "flash",
            "ds_lvx.kernels.flash_kernel:FlashKernel",
            obstacle="ds_lvx.kernels.flash_kernel:obstacle",
        ),
        Kernel(
            "cudnn",
            "ds_lvx.kernels.cudnn:CudnnKernel",
            dtypes=("bfloat16", "float16"),
            head_dims=(8, 128),
            obstacle="ds_lvx.kernels.cudnn:obstacle",
        ),
        Kernel(
            "triton",
            "ds_lvx.kernels.triton_kernel:TritonKernel",
            dtypes=("bfloat16", "float16", "float32"),
            head_dims=(16, 512),
            obstacle="ds_lvx.kernels.triton_kernel:obstacle",
            package="triton",
        ),
        Kernel(
            "triton_atomic",
            "ds_lvx.kernels.triton_kernel:TritonAtomicKernel",
            dtypes=("bfloat16", "float16", "float32"),
            head_dims=(16, 512),
            obstacle="ds_lvx.kernels.triton_kernel:obstacle",
            package="triton",
        ),
        Kernel("reference", "ds_lvx.kernels.reference:ReferenceKernel", for_speed=False),
    )
}


def method_words() -> tuple[str, ...]:
    """What ``method`` may be."""
    return (*METHODS, AUTO)


def schedule_words() -> tuple[str, ...]:
    """What ``schedule`` may be."""
    return (AUTO, *SCHEDULES)


def kernel_words() -> tuple[str, ...]:
    """What ``kernel`` may be."""
    return (AUTO, *KERNELS)


def can_chunk(schedule: str) -> bool:
    """Whether K and V may come in chunks under this schedule, or under one that ``auto`` finds."""
    return schedule == AUTO or SCHEDULES[schedule].takes_chunks
