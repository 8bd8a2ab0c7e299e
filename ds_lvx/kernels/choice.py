"""The kernel of a name, and those that ``auto`` chooses from (`ds_lvx.config.registry`)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from ds_lvx.config.registry import AUTO, FLOATS, KERNELS, kernel_words, loaded
from ds_lvx.config.registry import Kernel as Entry
from ds_lvx.kernels.auto import AutoKernel, preferred
from ds_lvx.kernels.interface import Kernel
from ds_lvx.kernels.repeats import repeats_on
from ds_lvx.kernels.table import Table, table_of
from ds_lvx.kernels.warn import warn_once

ALWAYS = "native"
"""Can do everything."""


def kernel_for(name: str, q: Tensor) -> Kernel:
    """The kernel of this name for queries like ``q``.

    ``auto`` chooses from `candidates` on CUDA, call by call (`ds_lvx.kernels.auto`), and is
    ``native`` elsewhere.

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
        return _auto(q)
    entry = KERNELS[name]
    problem = obstacle(entry, q)
    if problem is not None:
        able = [n for n in kernel_words() if n not in (AUTO, name) and not obstacle(KERNELS[n], q)]
        others = " or ".join(f"'{other}'" for other in able)
        raise ValueError(f"kernel: got {name!r}{problem}; use {others}")
    kernel: Kernel = entry.load()()
    return kernel


def _auto(q: Tensor) -> Kernel:
    found = candidates(q)
    if len(found) == 1:
        return found[ALWAYS]
    table = table_of(q.device)
    if table.ignored():
        warn_once(_ignored(table))
    return AutoKernel(found, table, repeats_on(q.device))


def candidates(q: Tensor) -> dict[str, Kernel]:
    """The kernels that ``auto`` chooses from for queries like ``q``, by name.

    None of them materialises S_q x S_kv. Off CUDA there is one: PyTorch's own.
    """
    entries = [KERNELS[ALWAYS]]
    if q.device.type == "cuda":
        others = (e for e in KERNELS.values() if e.for_speed and e.name != ALWAYS)
        entries += [entry for entry in others if obstacle(entry, q) is None]
    return {entry.name: entry.load()() for entry in entries}


def describe(q: Tensor) -> list[str]:
    """What ``auto`` takes for queries like ``q``, and why, in lines for a reader."""
    names = list(candidates(q))
    if names == [ALWAYS]:
        return [f"{ALWAYS}: the only one for {q.dtype} on {q.device.type} that is made for speed"]
    table = table_of(q.device)
    lines = [_by_rule(names, q)]
    if table.ignored():
        lines.append(_ignored(table))
    if not table.entries():
        return [*lines, "no kind tuned on this card: ds-lvx doctor --tune"]
    lines.append(f"{len(table.entries())} kinds tuned, which go before the rule, in {table.path}")
    for kind, entry in table.entries().items():
        times = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in entry["seconds"].items())
        out = "".join(f"; not {name}: {why}" for name, why in entry["excluded"].items())
        lines.append(f"{kind}: {entry['chosen']} ({times}{out})")
    return lines


def _by_rule(names: Sequence[str], q: Tensor) -> str:
    """The rule of `AutoKernel.choice` in words."""
    by_calls = next((n for n in ("cudnn", "flash") if n in names and preferred(n, q)), None)
    last = "triton" if "triton" in names else ALWAYS
    if by_calls is None:
        return last
    return (
        f"{by_calls} where all see all, or a few large slices make up the rule"
        f"{' (shapes that come often)' if by_calls == 'cudnn' else ''}, "
        f"{last} {'for other rules' if last == 'triton' else 'elsewhere'}"
    )


def _ignored(table: Table) -> str:
    found = ", ".join(path.name for path in table.ignored())
    return (
        f"kernels were tuned on another card or under other versions, which is ignored ({found} in "
        f"{table.path.parent}); tune this card: ds-lvx doctor --tune"
    )


def made_for_speed(q: Tensor) -> str:
    """The kernels other than ``native`` that are, each with what keeps it from queries like q."""
    others = (e for e in KERNELS.values() if e.for_speed and e.name != ALWAYS)
    return "; ".join(f"'{entry.name}'{obstacle(entry, q) or ''}" for entry in others)


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
    found: str | None = loaded(entry.obstacle)(q)
    return None if found is None else f" for {found}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
