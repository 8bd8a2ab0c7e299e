"""``ds-lvx compare``: the methods side by side, on the shapes and the network of your choice.

Options out of their range, or that do not fit each other, are a `ValueError`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ds_lvx.attention.shape import check_heads
from ds_lvx.compare.document import Subject, deliver
from ds_lvx.compare.harness import GATHERED, METHODS, Ranks, RunError, on_ranks
from ds_lvx.compare.network import NetworkError
from ds_lvx.compare.operators import rank as operators
from ds_lvx.compare.operators import subject as operators_subject
from ds_lvx.compare.operators.rank import Contest
from ds_lvx.compare.operators.tensors import ORDERS, VISIBILITIES, Shape
from ds_lvx.compare.training import model
from ds_lvx.config.registry import FLOATS, SHARDED, kernel_words
from ds_lvx.config.words import nearest
from ds_lvx.plan.units import at_least, count

WORDS = ("lvx", *METHODS)
_OF_ATTENTION = (
    *("seqlen_q", "seqlen_kv", "batch", "heads", "kv_heads", "head_dim", "visibility"),
    *("orders", "features_dim", "kernel"),
)
"""Options that say nothing of a model."""
_RENDERED = "expected a JSON that --output has written"
DEFAULT_METHODS = ("lvx", "ulysses", "ring", "none")


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
    lengths.add_argument("--dtype", choices=FLOATS, default="bfloat16")
    lengths.add_argument("--visibility", choices=VISIBILITIES, default="all")
    lengths.add_argument(
        "--orders",
        nargs="+",
        choices=ORDERS,
        default=ORDERS[:1],
        help="which rows a rank holds of causal ones: a run, an early and a late piece, or both "
        "ways beside each other",
    )
    how = parser.add_argument_group("how")
    both = argparse.BooleanOptionalAction
    how.add_argument(
        "--methods",
        nargs="+",
        default=DEFAULT_METHODS,
        metavar="METHOD",
        help=f"of {', '.join(WORDS)} (lvx: both schedules; gathered: the visual tokens on every "
        "rank; none: one process)",
    )
    how.add_argument("--kernel", choices=kernel_words(), default="auto")
    how.add_argument(
        "--recompute",
        action=both,
        help="K and V come from features by a projection, which lvx runs again in backward; "
        "--no-recompute: all methods keep K and V",
    )
    how.add_argument("--features-dim", type=int, help="of the features; default: heads * head-dim")
    how.add_argument("--overlap", action=both, default=True, help="transfers run under computation")
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
            check_places(options)
            return show(_read(options.render) if options.render else _measure(options), options)
    except (operators_subject.DisagreementError, RunError, NetworkError) as error:
        print(f"ds-lvx compare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ds-lvx compare: interrupted; ranks and network are gone", file=sys.stderr)
        return 130


def check_places(options: argparse.Namespace) -> None:
    """Make the folder of `add_output`; before anything is measured.

    Raises:
        ValueError: it cannot be made, or there is no such document.
    """
    if options.output is not None:
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--output: got {options.output} ({error.strerror}); expected a folder, or where "
                "one can be made"
            ) from None
    if options.document is not None and not options.document.is_file():
        raise ValueError(
            f"--document: got {options.document}, which is no file; expected Markdown that has a "
            "place for the table"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--render: got {path} ({error}); {_RENDERED}") from None
    if not isinstance(found, dict) or "records" not in found:
        raise ValueError(f"--render: got {path}, which holds something else; {_RENDERED}")
    return found


def _check_use(options: argparse.Namespace) -> None:
    """Refuse options that what is compared would not look at."""
    parser = argparse.ArgumentParser()
    (add_measurement if options.model else model.add_arguments)(parser)
    unused = _OF_ATTENTION if options.model else vars(parser.parse_args([]))
    for name in (n for n in unused if getattr(options, n) != parser.get_default(n)):
        with_, use = ("with", "leave out") if options.model else ("without", "add")
        raise ValueError(
            f"--{name.replace('_', '-')}: got {getattr(options, name)} {with_} --model, where it "
            f"says nothing; {use} --model, or leave this out"
        )


def show(results: Mapping[str, Any], options: argparse.Namespace) -> int:
    """Print the table or the JSON, and write the files; 1 where models disagree."""
    subject: Subject = model if "job" in results else operators_subject
    apart = results.get("disagreements", ())
    deliver(
        subject,
        results,
        program="ds-lvx compare",
        folder=options.output,
        document=None if apart else options.document,
        as_json=options.json,
    )
    for line in apart:
        print(f"ds-lvx compare: {line}", file=sys.stderr)
    return 1 if apart else 0


def settle_measurement(options: argparse.Namespace) -> None:
    """Replace words of the options of `add_measurement` by what they mean."""
    options.methods = _methods_of(options.methods)
    options.recompute = bool(options.recompute)
    at_least(0, warmup=options.warmup)
    at_least(1, repeats=options.repeats)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    _check_use(options)
    settle_measurement(options)
    ranks = Ranks.here(
        options.ranks,
        options.threads,
        device=options.device,
        network=options.network,
        timeout_s=options.timeout_s,
    )
    say = partial(print, file=sys.stderr, flush=True)
    if options.model:
        task = model.task_of(options, ranks=ranks.count)
        if GATHERED in options.methods and task.case.attends == "cross":
            raise ValueError(
                f"--methods: got {GATHERED!r} with --model {options.model}; expected it with a "
                "model whose visual tokens stand among the text's, or without --model"
            )
        return model.compare(task, options.methods, ranks, say=say)
    contest, skipped = contest_of(options, ranks.count)
    say(f"{', '.join(contest.methods)} on {ranks.count} ranks of {ranks.threads} threads ...")
    answers = on_ranks(operators.measure, contest, ranks, joins=True)
    return operators_subject.assemble(contest, answers, ranks, skipped=skipped)


def contest_of(options: argparse.Namespace, ranks: int) -> tuple[Contest, dict[str, str]]:
    """What the options ask for, and the methods that cannot do it, with the reason."""

    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(options, name) for name in names}

    features_dim = options.features_dim
    if options.recompute and features_dim is None:
        features_dim = options.heads * options.head_dim
    shape = Shape(
        seqlen_q=count(options.seqlen_q, what="--seqlen-q"),
        seqlen_kv=count(options.seqlen_kv, what="--seqlen-kv"),
        kv_heads=options.heads if options.kv_heads is None else options.kv_heads,
        features_dim=features_dim,
        **given("batch", "heads", "head_dim", "dtype", "visibility"),
    )
    orders = tuple(dict.fromkeys(options.orders))
    if "zigzag" in orders and shape.visibility != "causal":
        raise ValueError(
            f"--orders: got zigzag with --visibility {shape.visibility}; expected causal, which is "
            "what it evens out"
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
    how = given("recompute", "overlap", "kernel", "warmup", "repeats")
    return Contest(shape, able, orders=orders, **how), skipped


def _methods_of(words: Sequence[str]) -> tuple[str, ...]:
    """Methods by their names; ``lvx`` is both schedules, and none comes twice."""
    found: dict[str, None] = {}
    for word in words:
        if word not in WORDS:
            near = nearest(word, WORDS)
            hint = f"; did you mean {near!r}?" if near else ""
            raise ValueError(f"--methods: got {word!r}; expected some of {list(WORDS)}{hint}")
        found |= dict.fromkeys((f"lvx-{each}" for each in SHARDED) if word == "lvx" else (word,))
    return tuple(found)


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Let a request to end, such as a scheduler's, clean up as Ctrl-C does."""
    ends = (signal.SIGTERM, signal.SIGHUP)
    earlier = {number: signal.signal(number, signal.default_int_handler) for number in ends}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
