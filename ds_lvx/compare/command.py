"""``ds-lvx compare``: the methods side by side, on the shapes and the network of your choice."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from rich.console import Console

from ds_lvx.attention.ulysses import check_heads
from ds_lvx.compare.fresh import RunError, run_fresh
from ds_lvx.compare.machine import cores, header
from ds_lvx.compare.model import measure as model
from ds_lvx.compare.network import MASTER, Lab, Network, NetworkError
from ds_lvx.compare.operators import plots, report
from ds_lvx.compare.operators import rank as operators
from ds_lvx.compare.operators.inputs import DTYPES, VISIBILITIES, Shape
from ds_lvx.compare.operators.rank import METHODS, Request
from ds_lvx.kernels import KERNELS
from ds_lvx.plan.units import count

BOTH_SCHEDULES = ("lvx-gather", "lvx-ring")
DEFAULT_METHODS = ("lvx", "ulysses", "ring", "none")
_WIDTH = 140


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``ds-lvx compare``."""
    add_measurement(parser)
    parser.add_argument("--model", help="compare a training step of it: see below")
    model.add_arguments(parser)
    group = parser.add_argument_group("where")
    group.add_argument("--ranks", type=int, help="processes; default: one a GPU, 4 without GPUs")
    group.add_argument("--threads", type=int, help="of a rank; default: its share of the cores")
    group.add_argument("--device", choices=("auto", "cpu", "accelerator"), default="auto")
    group.add_argument(
        "--network",
        metavar="RATE[,LATENCY]",
        help="an emulated network between the ranks, such as 200mbit or 1gbit,1ms (needs root)",
    )
    parser.add_argument("--timeout-s", type=float, default=3600.0, help="for the whole run")
    add_output(parser)
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="show a result; measure nothing"
    )


def add_measurement(parser: argparse.ArgumentParser) -> None:
    """The options that say what is measured."""
    lengths = parser.add_argument_group("shapes (of the whole sequence; 64K is 65,536)")
    lengths.add_argument("--seqlen-q", default="256")
    lengths.add_argument("--seqlen-kv", default="32K")
    lengths.add_argument("--batch", type=int, default=1)
    lengths.add_argument("--heads", type=int, default=8)
    lengths.add_argument("--kv-heads", type=int, help="default: as many as --heads")
    lengths.add_argument("--head-dim", type=int, default=64)
    lengths.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    lengths.add_argument("--visibility", choices=VISIBILITIES, default="all")
    how = parser.add_argument_group("how")
    names = ("lvx", *METHODS)
    how.add_argument(
        "--methods",
        nargs="+",
        default=DEFAULT_METHODS,
        metavar="METHOD",
        help=f"of {', '.join(names)} (lvx: both schedules; none: one process)",
    )
    how.add_argument("--kernel", choices=KERNELS, default="auto")
    how.add_argument(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help="K and V come from features by a projection, which lvx runs again in backward; "
        "--no-recompute: all methods keep K and V",
    )
    how.add_argument("--features-dim", type=int, help="of the features; default: heads * head-dim")
    how.add_argument(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="transfers run under computation",
    )
    how.add_argument("--warmup", type=int, default=2, help="steps of each method, not counted")
    how.add_argument("--repeats", type=int, default=10, help="steps of each method")


def add_output(parser: argparse.ArgumentParser) -> None:
    """The options that say what is written."""
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, metavar="DIR", help="folder for JSON and plot")
    group.add_argument("--json", action="store_true", help="print the JSON, not the table")
    group.add_argument("--document", type=Path, help="Markdown file that gets the table")


def run(options: argparse.Namespace) -> int:
    """Measure and report; 0, or 1 where methods disagree or a rank failed."""
    try:
        with ending_in_order():
            if options.render is not None:
                results = json.loads(options.render.read_text())
                (model.show if "job" in results else show)(results, options)
                return 0
            settle(options)
            if options.model is not None:
                return model.run(options)
            show(_run(options), options)
    except (report.DisagreementError, RunError, NetworkError) as error:
        print(f"ds-lvx compare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ds-lvx compare: interrupted; ranks and network are gone", file=sys.stderr)
        return 130
    return 0


def settle(options: argparse.Namespace) -> None:
    """Replace words by what they mean, and defaults that depend on the machine by their values.

    Raises:
        ValueError: options out of their range, or that do not fit each other.
    """
    settle_measurement(options)
    options.network = None if options.network is None else Network.parse(options.network)
    options.device = _device(options.device, options.network)
    devices = get_accelerator().device_count() if options.device != "cpu" else 0
    if options.ranks is None:
        options.ranks = devices or 4
    _check_at_least("--ranks", options.ranks, 1)
    if devices and options.ranks > devices:
        raise ValueError(
            f"--ranks: got {options.ranks} for {devices} devices; expected one for each rank, or "
            "--device cpu"
        )
    if options.threads is None:
        options.threads = max(cores() // options.ranks, 1)
    _check_at_least("--threads", options.threads, 1)


def settle_measurement(options: argparse.Namespace) -> None:
    """The part of `settle` that is about the options of `add_measurement`."""
    options.methods = methods_of(options.methods)
    options.recompute = bool(options.recompute)
    _check_at_least("--warmup", options.warmup, 0)
    _check_at_least("--repeats", options.repeats, 1)


def _run(options: argparse.Namespace) -> dict[str, Any]:
    request, skipped = request_of(options, options.ranks)
    say = Console(stderr=True, highlight=False)
    where = f"{options.ranks} ranks of {options.threads} threads"
    say.print(f"{', '.join(request.methods)} on {where} ...")
    network, lab = options.network, None
    if network is not None:
        lab = Lab(network, ranks=options.ranks, name=f"lvx{os.getpid()}")
    with nullcontext() if lab is None else lab:
        answers = run_fresh(
            operators.__name__,
            asdict(request),
            ranks=options.ranks,
            threads=options.threads,
            timeout_s=options.timeout_s,
            environment={"DS_ACCELERATOR": "cpu"} if options.device == "cpu" else {},
            places=None if lab is None else lab.places(),
            master="127.0.0.1" if lab is None else MASTER,
        )
    return assemble(
        request,
        answers,
        skipped=skipped,
        network=None if network is None else str(network),
        device=options.device,
        threads=options.threads,
    )


def request_of(options: argparse.Namespace, ranks: int) -> tuple[Request, dict[str, str]]:
    """What the options ask for, and the methods that cannot do it, with the reason.

    Raises:
        ValueError: an option that is out of its range, or no method that is left.
    """
    features_dim = options.features_dim
    if options.recompute and features_dim is None:
        features_dim = options.heads * options.head_dim
    shape = Shape(
        seqlen_q=count(options.seqlen_q, what="--seqlen-q"),
        seqlen_kv=count(options.seqlen_kv, what="--seqlen-kv"),
        batch=options.batch,
        heads=options.heads,
        kv_heads=options.heads if options.kv_heads is None else options.kv_heads,
        head_dim=options.head_dim,
        dtype=options.dtype,
        visibility=options.visibility,
        features_dim=features_dim,
    )
    skipped = {}
    if "ulysses" in options.methods:
        try:
            check_heads(shape.heads, ranks)
        except ValueError as error:
            skipped["ulysses"] = str(error).removeprefix("ulysses: ")
    able = tuple(method for method in options.methods if method not in skipped)
    if not able:
        raise ValueError(f"--methods: none is left: {'; '.join(skipped.values())}")
    request = Request(
        shape,
        able,
        recompute=options.recompute,
        overlap=options.overlap,
        kernel=options.kernel,
        warmup=options.warmup,
        repeats=options.repeats,
    )
    return request, skipped


def methods_of(words: Sequence[str]) -> tuple[str, ...]:
    """Methods by their names; ``lvx`` is both schedules, and none comes twice.

    Raises:
        ValueError: an unknown one; names the nearest.
    """
    found: dict[str, None] = {}
    for word in words:
        if word != "lvx" and word not in METHODS:
            near = get_close_matches(word, ("lvx", *METHODS), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"--methods: got {word!r}; expected some of {['lvx', *METHODS]}{hint}")
        found |= dict.fromkeys(BOTH_SCHEDULES if word == "lvx" else (word,))
    return tuple(found)


def assemble(
    request: Request,
    answers: Sequence[Mapping[str, Any]],
    *,
    skipped: Mapping[str, str],
    network: str | None,
    device: str,
    threads: int,
    ranks_of_a_node: int = 1,
) -> dict[str, Any]:
    """Everything for the JSON.

    Raises:
        report.DisagreementError: methods do not compute the same.
    """
    largest = report.check(answers)
    return {
        **header(emulated=bool(network), device=device),
        "network": report.network_record(network, ranks_of_a_node=ranks_of_a_node),
        "ranks": len(answers),
        "threads_per_rank": threads,
        "units": "seconds of the slowest rank in each step, begun together; bytes of the rank that "
        "sends most, forward and backward of one step; `ranks` has every sample of every rank",
        **asdict(request),
        "skipped": dict(skipped),
        "largest_differences": largest,
        "records": report.records(answers),
    }


def show(results: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Print the table or the JSON, and write the files."""
    text = json.dumps(results, indent=1) + "\n"
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"{report.name(results)}.json"
        path.write_text(text)
        try:
            plots.save(results, path.with_suffix(".png"))
        except ModuleNotFoundError as error:
            print(f"no plot: {error}; pip install 'ds_lvx[plots]'", file=sys.stderr)
    if options.document is not None:
        report.write_into(options.document, results)
    if options.json:
        print(text, end="")
    else:
        # A file or a pipe has no width of its own.
        width = None if sys.stdout.isatty() else _WIDTH
        Console(width=width).print(report.terminal(results))


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Let a request to end, such as a scheduler's, clean up as Ctrl-C does."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    earlier = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _device(name: str, network: Network | None) -> str:
    found: str = get_accelerator().device_name()
    if name == "cpu" or (name == "auto" and network is not None):
        return "cpu"
    if name == "accelerator" and network is not None:
        raise ValueError(
            "--network: got it with --device accelerator, whose ranks would not use the emulated "
            "network but the links between the devices; leave one of both away"
        )
    if name == "accelerator" and found == "cpu":
        raise ValueError("--device: got 'accelerator'; this machine has none; use cpu")
    return found


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: got {value}; expected at least {least}")
