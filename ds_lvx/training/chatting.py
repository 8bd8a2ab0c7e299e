"""Several questions about the same images and videos, typed on the first rank."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from typing import Any, TextIO

from ds_lvx.data.conversation import Conversation, Message, Part
from ds_lvx.data.errors import Source
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.together import told

OPEN = "?"  # in the place of an answer that nobody knows
_WAIT_S = 20.0  # other ranks wait for the first one no longer than their group's time-out
_BYTES = 1 << 16
_SIGN = "\n> "


class Questions:
    """The lines of a file or a terminal, the same on every rank.

    Args:
        file: of the first rank; others do not touch theirs.
        world: all ranks.
        first: a question that comes before it, of one line or more.
    """

    def __init__(self, file: TextIO, world: Channel, first: str | None = None) -> None:
        self._world, self._reads = world, world.rank == 0
        self._file, self._shows = file, self._reads and file.isatty()
        self._ended = False
        self._first, self._rest = first, b""

    def __iter__(self) -> Iterator[str]:
        """Questions until the file ends; blank lines are skipped.

        Collectives: one agreement on the control plane for a question, and while nobody types one
        every 20 s.
        """
        asked = True
        while True:
            if asked and self._shows and not self._rest and self._first is None:
                print(_SIGN, end="", flush=True)
            _, records = told(self._world, lambda: (None, self._next()))
            line = records[0].get("line", "").strip()
            if records[0].get("ended"):
                return
            asked = "line" in records[0]
            if line:
                yield line

    def _next(self) -> dict[str, Any]:
        """What the first rank has to say: a line, the end, or that there is none yet."""
        if not self._reads:
            return {}
        if self._first is not None:
            line, self._first = self._first, None
            return {"line": line}
        while b"\n" not in self._rest and not self._ended:
            if not select.select([self._file], [], [], _WAIT_S)[0]:
                return {}
            # Not by the file's own buffer, in which lines would wait that select() does not see.
            more = os.read(self._file.fileno(), _BYTES)
            self._ended, self._rest = not more, self._rest + more
        typed, _, self._rest = self._rest.partition(b"\n")
        if self._ended and not typed and not self._rest:
            return {"ended": True}
        return {"line": typed.decode(errors="replace")}


def conversation(media: tuple[Part, ...], turns: list[tuple[str, str]]) -> Conversation:
    """A chat that ends with the answer that is asked for.

    Args:
        media: images and videos, which stand before the first question.
        turns: questions and answers; the last answer is `OPEN`.
    """
    messages: list[Message] = []
    for number, (question, answer) in enumerate(turns):
        before = media if number == 0 else ()
        messages.append(Message("user", (*before, Part("text", question))))
        last = number == len(turns) - 1
        messages.append(Message("assistant", (Part("text", answer),), learnt=last))
    return Conversation(Source("--prompt", len(turns)), tuple(messages))
