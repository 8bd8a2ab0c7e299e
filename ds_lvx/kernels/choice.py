"""The kernel of a name, and those that ``auto`` chooses from (`ds_lvx.config.registry`)."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from ds_lvx.config.registry import AUTO, FLOATS, KERNELS, kernel_words
from ds_lvx.config.registry import Kernel as Entry
from ds_lvx.kernels.auto import TRUSTED, AutoKernel, table_of
from ds_lvx.kernels.interface import Kernel


def kernel_for(name: str, q: Tensor) -> Kernel:
    """The kernel of this name for queries like ``q``.

    ``auto`` is, on CUDA, the fastest of `candidates` for each kind of problem
    (`ds_lvx.kernels.auto`), and ``native`` elsewhere.

    Raises:
        ValueError: an unknown name, or a dtype, head_dim or device that the kernel cannot do; names
            the kernels that can.
    """
    if name not in kernel_words():
        raise ValueError(f"kernel: got {name!r}; expected one of {list(kernel_words())}")
    if _dtype(q.dtype) not in FLOATS:
        expected = ", ".join(f"torch.{dtype}" for dtype in FLOATS)
        raise ValueError(
            f"q, k, v: got {q.dtype}; expected one of {expected}; convert them with .to(...)"
        )
    if name == AUTO:
        found = candidates(q)
        return found[TRUSTED] if len(found) == 1 else AutoKernel(found, table_of(q.device))
    entry = KERNELS[name]
    problem = obstacle(entry, q)
    if problem is not None:
        able = [n for n in kernel_words() if n not in (AUTO, name) and not obstacle(KERNELS[n], q)]
        others = " or ".join(f"'{other}'" for other in able)
        raise ValueError(f"kernel: got {name!r}{problem}; use {others}")
    kernel: Kernel = entry.load()()
    return kernel


def candidates(q: Tensor) -> dict[str, Kernel]:
    """The kernels that ``auto`` chooses from for queries like ``q``, by name.

    None of them materialises S_q x S_kv. Off CUDA there is one: PyTorch's own.
    """
    entries = [KERNELS[TRUSTED]]
    if q.device.type == "cuda":
        others = (e for e in KERNELS.values() if e.for_speed and e.name != TRUSTED)
        entries += [entry for entry in others if obstacle(entry, q) is None]
    return {entry.name: entry.load()() for entry in entries}


def describe(q: Tensor) -> list[str]:
    """What ``auto`` takes for queries like ``q``, and why, in lines for a reader."""
    names = list(candidates(q))
    if names == [TRUSTED]:
        return [f"{TRUSTED}: the only one for {q.dtype} on {q.device.type} that is made for speed"]
    table = table_of(q.device)
    lines = [f"the fastest of {', '.join(names)} for each kind of call, as measured at the first"]
    lines.append(f"{len(table.entries())} kinds measured so far, in {table.path}")
    for kind, entry in table.entries().items():
        times = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in entry["seconds"].items())
        out = "".join(f"; not {name}: {why}" for name, why in entry["excluded"].items())
        lines.append(f"{kind}: {entry['chosen']} ({times}{out})")
    return lines


def obstacle(entry: Entry, q: Tensor) -> str | None:
    """Why a kernel cannot do queries like ``q``, to go behind its name; None where it can."""
    if entry.package and find_spec(entry.package) is None:
        return f", which is not installed; pip install {entry.package} (Linux)"
    if _dtype(q.dtype) not in entry.dtypes:
        expected = ", ".join(f"torch.{dtype}" for dtype in entry.dtypes)
        return f" for {q.dtype}, where it does {expected}"
    if entry.head_dims is not None:
        least, most = entry.head_dims
        if not least <= q.shape[-1] <= most:
            return f" for head_dim {q.shape[-1]}, where it does {least} to {most}"
    if not entry.obstacle:
        return None
    # By name and late: Triton takes a second to import, and decides then whether to interpret.
    module, _, name = entry.obstacle.partition(":")
    found: str | None = getattr(import_module(module), name)(q)
    return None if found is None else f" for {found}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
