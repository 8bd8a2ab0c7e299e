"""The samples of a run, looked at before its model is loaded: each once a node, good ones kept.

The ranks of a node share the lines of a file, and what is left of a large share goes to processes
of their own, one for each core. A sample that ends the process which opens it is a bad sample.
"""

from __future__ import annotations

import importlib.metadata
import os
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection

from ds_lvx.data.batch import BatchMaker, FrameRate
from ds_lvx.data.chat import Chats
from ds_lvx.data.checked import CheckedLines, line_key
from ds_lvx.data.errors import DataError
from ds_lvx.data.limits import DEFAULT_LIMITS, Limits
from ds_lvx.data.text import TextEncoder
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.together import told
from ds_lvx.training.model import Source

_IN_THIS_PROCESS = 500
"""Samples that are looked at sooner than a process is started."""
_MOST_PROCESSES = 16
_MOST_NAMED = 20
_MOST_CHARACTERS = 500


@dataclass(frozen=True)
class Checks:
    """What a sample has to pass.

    Attributes:
        level: ``"lines"``: the chat format, and that files exist; ``"headers"``: the headers of
            media and the number of tokens too; ``"frames"``: every frame that would be taken.
        model: folder or hub name of the checkpoint whose tokenizer counts.
        max_length: tokens that a sample may have.
        min_tokens: and must have.
        rate: which frames of a video are taken.
        limits: for images and films.
        trust_remote_code: code that comes with the checkpoint may run.
    """

    level: str
    model: str
    max_length: int
    min_tokens: int
    rate: FrameRate
    limits: Limits = DEFAULT_LIMITS
    trust_remote_code: bool = False

    def maker(self, source: Source) -> BatchMaker:
        """What makes samples, as the run will, but on one rank."""
        encoder = TextEncoder(source.processor, self.max_length, family=source.family)
        return BatchMaker(
            encoder, self.rate, owned=range, min_tokens=self.min_tokens, limits=self.limits
        )


def bad_samples(
    chats: Chats, checks: Checks, source: Source, *, world: Channel, skip: bool
) -> dict[int, str]:
    """Look at every sample of a file.

    Args:
        chats: the file.
        checks: what its samples have to pass.
        source: of the model.
        world: all ranks, which take shares.
        skip: return what is wrong; else it is raised.

    Returns:
        What is wrong with which samples, the same on all ranks.

    Raises:
        ValueError: on all ranks: bad samples, the first of each rank's share and how many there
            are in all; or, where they are skipped, that no good one is left.

    Collectives: two agreements on the control plane.
    """
    _, hosts = told(world, lambda: (None, {"host": socket.gethostname()}))
    node = [rank for rank, record in enumerate(hosts) if record == hosts[world.rank]]
    mine = range(node.index(world.rank), len(chats), len(node))

    def look() -> tuple[None, dict[str, Mapping[int, str]]]:
        processes = _cores() // len(node)
        found = _look(chats, mine, checks, source, processes=processes, speak=world.rank == 0)
        if found and not skip:
            raise ValueError(listed(list(found.values())))
        return None, {"bad": {n: text[:_MOST_CHARACTERS] for n, text in found.items()}}

    _, records = told(world, look)
    bad = {int(n): text for record in records for n, text in record["bad"].items()}
    if len(bad) == len(chats):
        raise ValueError("no good sample is left: " + listed(list(bad.values())))
    return dict(sorted(bad.items()))


def listed(problems: Sequence[str]) -> str:
    """The first problems, a line each, and how many more there are."""
    lines = list(problems[:_MOST_NAMED])
    if len(problems) > len(lines):
        lines.append(f"and {len(problems) - len(lines)} more such lines")
    return "\n".join(lines)


def _look(
    chats: Chats,
    mine: Sequence[int],
    checks: Checks,
    source: Source,
    *,
    processes: int,
    speak: bool,
) -> dict[int, str]:
    """What is wrong with which samples of one rank's share."""
    maker = checks.maker(source)
    known = CheckedLines(chats.lines.path, _settings(checks, maker.encoder))
    bad: dict[int, str] = {}
    keys: dict[int, str] = {}
    for index in mine:
        try:
            conversation = chats[index]
            key = line_key(chats.lines.raw(index), conversation)
        except DataError as error:
            bad[index] = str(error)
        except OSError as error:  # a file that was there a moment ago
            bad[index] = f"{chats.lines.source(index)}: {error}"
        else:
            if checks.level != "lines" and key not in known:
                keys[index] = key
    todo = list(keys)
    processes = min(max(processes, 1), _MOST_PROCESSES, len(todo) // _IN_THIS_PROCESS + 1)
    if speak and processes > 1:
        print(
            f"ds_lvx: looking at {len(todo):,} samples of {chats.lines.path} in {processes} "
            f"processes (--check_data {checks.level})",
            flush=True,
        )
    if processes == 1:
        found = {index: _problem(chats, maker, index, checks.level) for index in todo}
    else:
        shares = [todo[n::processes] for n in range(processes)]
        found = {}
        with ThreadPoolExecutor(processes) as threads:
            for part in threads.map(lambda share: _in_a_process(chats, checks, share), shares):
                found |= part
    known.add(keys[index] for index, problem in found.items() if problem is None)
    return dict(sorted((bad | {n: text for n, text in found.items() if text is not None}).items()))


def _problem(chats: Chats, maker: BatchMaker, index: int, level: str) -> str | None:
    try:
        conversation = chats[index]
        try:
            for part in conversation.media:
                maker.chooser.check(part)
        except ValueError as error:
            raise DataError(f"{conversation.source}: {error}") from None
        sample = maker.sample(conversation)
        if level == "frames":
            maker.decode(sample)
    except DataError as error:
        return str(error)
    return None


def _in_a_process(chats: Chats, checks: Checks, share: Sequence[int]) -> dict[int, str | None]:
    """What is wrong with some samples, or None, looked at in another process.

    Raises:
        ValueError: the process does not start.
    """
    found: dict[int, str | None] = {}
    while rest := share[len(found) :]:
        context = get_context("spawn")
        receive, send = context.Pipe(duplex=False)
        work = context.Process(target=_work, args=(send, chats, checks, rest), daemon=True)
        work.start()
        send.close()  # the process has the only one: its end is the end of the pipe
        started = False
        try:
            started = receive.recv()
            for index in rest:
                found[index] = receive.recv()
        except EOFError:
            work.join()
            if not started:
                raise ValueError(
                    f"--check_data: got a process that ended before its first sample (exit code "
                    f"{work.exitcode}); expected one for each core; pass --check_data lines"
                ) from None
            index = share[len(found)]
            found[index] = str(
                DataError.at(
                    chats.lines.source(index),
                    got=f"a sample that ends the process which opens it (exit code "
                    f"{work.exitcode})",
                    expected="media that can be read",
                    do="replace its files or drop the line",
                )
            )
        work.join()
    return found


def _work(send: Connection, chats: Chats, checks: Checks, share: Sequence[int]) -> None:
    """Tell of each sample what is wrong; before the first, that the work begins."""
    checks.limits.tell_pil()
    source = Source.of(checks.model, trust_remote_code=checks.trust_remote_code)
    maker = checks.maker(source)
    send.send(True)
    for index in share:
        send.send(_problem(chats, maker, index, checks.level))


def _settings(checks: Checks, encoder: TextEncoder) -> str:
    """All that decides whether a line is good, beside the line and its files."""
    version = importlib.metadata.version("ds_lvx")
    return repr((version, checks, encoder.fingerprint))


def _cores() -> int:
    return len(os.sched_getaffinity(0))
