"""``ds-lvx doctor --tune``: measures this card's kernels, and writes the table of ``auto``.

Every kernel is checked against float64 before its time counts (`ds_lvx.compare.kernels`).
Only a finished comparison is kept. A kernel that raises is named and has no part in the row: the
next tuning tries it again. Where memory runs out, or nothing can be checked, there is no row.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch

from ds_lvx.compare.kernels import Exact, exact, samples_s
from ds_lvx.compare.operators.tensors import Shape, make_shards
from ds_lvx.config import LVXConfig, read_ds_config
from ds_lvx.config.registry import AUTO, FLOATS, METHODS
from ds_lvx.kernels import flash_version
from ds_lvx.kernels.choice import candidates
from ds_lvx.kernels.interface import Kernel
from ds_lvx.kernels.table import Table, kind_of, table_of
from ds_lvx.kernels.warn import warn_once
from ds_lvx.models.dimensions import Model
from ds_lvx.models.precision import training_dtype
from ds_lvx.plan.models import model
from ds_lvx.plan.units import count

TOLERANCE = {"bfloat16": 4e-2, "float16": 1e-2, "float32": 1e-3, "float64": 1e-3}
"""Largest error, as a share of the largest value."""
_REPEATS, _SECONDS = 20, 0.2

Run: TypeAlias = Callable[[], Any]
Clock: TypeAlias = Callable[[Run], float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that go with ``--tune``."""
    group = parser.add_argument_group("tuning (the shapes of a config, or those of one rank)")
    group.add_argument("--tune", action="store_true", help="measure this card's kernels for auto")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="ds_config; gives ranks, methods, dtype. Without --tune: looked at",
    )
    group.add_argument("--model", help="name on the Hugging Face hub, or path of a config.json")
    group.add_argument("--text", default="4096", help="text tokens of a sample (64K is 65,536)")
    group.add_argument("--frames", type=int, default=64, help="of a sample")
    group.add_argument("--seqlen-q", default="256", help="queries that one rank attends with")
    group.add_argument("--seqlen-kv", default="32K", help="keys of one rank")
    group.add_argument("--heads", type=int, default=32)
    group.add_argument("--kv-heads", type=int, default=8)
    group.add_argument("--head-dim", type=int, default=128)
    group.add_argument("--dtype", choices=FLOATS, default="bfloat16")


def run(options: argparse.Namespace) -> int:
    """Measure, write the table and print it; 0.

    Raises:
        ValueError: a model without a config, a config without a model, or a bad shape.
    """
    shapes = shapes_of(options)
    if not torch.cuda.is_available():
        print("nothing to tune: without CUDA, auto is native")
        return 0
    if options.config is not None:
        flash_version.activate(LVXConfig.from_ds_config(options.config).flash_attention)
    device = torch.device("cuda", torch.cuda.current_device())
    table = table_of(device)
    for shape in shapes:
        for kind, entry in tune(shape, table, device):
            times = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in entry["seconds"].items())
            print(f"{kind}: {entry['chosen']} ({times})", flush=True)
    print(f"{len(table.entries())} kinds in {table.path}")
    return 0


def shapes_of(options: argparse.Namespace) -> list[Shape]:
    """What is measured: the calls of a config's methods, or those of one shape; each once."""
    if (options.config is None) != (options.model is None):
        got, lacks = ("--config", "--model") if options.model is None else ("--model", "--config")
        raise ValueError(f"{lacks}: got none beside {got}; expected both, or a shape by --seqlen-q")
    if options.config is not None:
        section = LVXConfig.from_ds_config(options.config)
        found = of_model(
            section,
            model(options.model),
            text=count(options.text, what="--text"),
            frames=options.frames,
            dtype=str(training_dtype(read_ds_config(options.config))).removeprefix("torch."),
        )
        return list(dict.fromkeys(found))
    shape = Shape(
        count(options.seqlen_q, what="--seqlen-q"),
        count(options.seqlen_kv, what="--seqlen-kv"),
        heads=options.heads,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        dtype=options.dtype,
    )
    return list(_rules(shape))


def of_model(
    section: LVXConfig, wanted: Model, *, text: int, frames: int, dtype: str
) -> Iterator[Shape]:
    """The calls of a rank in cross-attention and in self-attention, by every method of a config.

    Args:
        section: its methods; for ``auto`` all that it may take.
        wanted: whose heads they are.
        text, frames: of a sample.
        dtype: of q, k and v.
    """
    ranks = section.sequence_parallel_size
    visual = frames * wanted.with_frames(frames).frame_tokens
    for layers, keys in ((wanted.cross, visual), (wanted.text, text)):
        for inside, gathers in _ways(section):
            heads, kv_heads = _share(layers.heads, inside), _share(layers.kv_heads, inside)
            if heads % kv_heads:
                continue
            own = Shape(
                _share(text, ranks // inside),
                _share(keys, ranks // inside),
                heads=heads,
                kv_heads=kv_heads,
                head_dim=layers.head_dim,
                dtype=dtype,
            )
            yield from _rules(own)
            if gathers and layers is wanted.cross:
                yield from _rules(replace(own, seqlen_q=text))


def _ways(section: LVXConfig) -> Iterator[tuple[int, bool]]:
    """Ranks among which a config's methods split heads, and whether one of them attends with the
    queries of all ranks in cross-attention."""
    named = {rule.method for rule in section.layers}
    whole = {m for m, entry in METHODS.items() if entry.distributed and not entry.subgroups}
    methods = whole if AUTO in named else named
    if {"ring", "lvx"} & methods:
        yield 1, "lvx" in methods
    for rule in section.layers:
        if rule.ulysses is not None:
            yield rule.ulysses, rule.across != "ring"
    if "ulysses" in methods:
        yield section.sequence_parallel_size, False


def _rules(shape: Shape) -> Iterator[Shape]:
    """A shape where all see all, causal where there are as many keys, and over frames."""
    yield shape
    square = shape.seqlen_q == shape.seqlen_kv
    yield replace(shape, visibility="causal" if square else "frames")


def _share(total: int, ranks: int) -> int:
    return max(-(-total // ranks), 1)


@dataclass(frozen=True)
class Contest:
    """Kernels on one case, and how they are timed."""

    kernels: Mapping[str, Kernel]
    known: Exact
    tolerance: float
    clock: Clock

    def entry(self, direction: str) -> dict[str, Any] | None:
        """A row of the table; None where memory ran out, or no kernel is right.

        Args:
            direction: ``"forward"`` or ``"backward"``.
        """
        problem = self.known.problem
        upstream = None if direction == "forward" else self.known.upstream
        seconds: dict[str, float] = {}
        excluded: dict[str, str] = {}
        for name, kernel in self.kernels.items():
            if not kernel.serves(problem, upstream):
                continue
            once: Run = partial(kernel.forward, problem)
            if upstream is not None:
                once = partial(kernel.backward, problem, upstream)
            kind = f"{kind_of(problem, upstream)}: {name}"
            try:
                error = max(self.known.errors(direction, once()).values())
                if not error <= self.tolerance:
                    excluded[name] = f"differs from float64 by {error:.1e} of the largest value"
                    warn_once(f"{kind} {excluded[name]}, and is not taken")
                    continue
                seconds[name] = self.clock(once)
            except torch.OutOfMemoryError:
                warn_once(f"{kind} ran out of memory; nothing is kept of this comparison")
                return None
            # Whatever a kernel raises is told, and forgotten.
            except Exception as error:  # noqa: BLE001
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                warn_once(f"{kind} failed, and has no part in this comparison: {reason}")
        if not seconds:
            return None
        chosen = min(seconds, key=lambda name: seconds[name])
        return {"chosen": chosen, "seconds": seconds, "excluded": excluded}


def tune(
    shape: Shape, table: Table, device: torch.device, *, clock: Clock | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure the kernels of a device on a shape, both directions, into a table.

    Args:
        shape: one rank's call.
        table: gets the rows.
        device: that computes.
        clock: seconds of a function; None: by the device's own.

    Yields:
        Each row that was written: its kind and its entry.
    """
    try:
        known = exact(make_shards(shape, ranks=1, shards=[0], device=device))
    except (torch.OutOfMemoryError, ArithmeticError) as error:
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        warn_once(f"{shape}: cannot be checked, and is not tuned: {what}")
        return
    found = candidates(known.problem.q)
    contest = Contest(found, known, TOLERANCE[shape.dtype], clock or partial(_seconds, device))
    for direction in ("forward", "backward"):
        entry = contest.entry(direction)
        if entry is not None:
            upstream = None if direction == "forward" else known.upstream
            kind = kind_of(known.problem, upstream)
            table.add(kind, entry)
            yield kind, entry


def _seconds(device: torch.device, once: Run) -> float:
    return statistics.median(samples_s(once, device, repeats=_REPEATS, seconds=_SECONDS))
