"""A question and its answer in two columns, with media in others.

The names are those of TRL (``prompt``, ``completion``; lists of messages too), Alpaca
(``instruction``, ``input``, ``output``) and their like; ``history`` has the turns before. Where no
question has a placeholder, the media come before the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ds_lvx.data.conversation import Turn
from ds_lvx.data.errors import DataError, Source, shown
from ds_lvx.data.formats import media, turns

PROMPTS = ("prompt", "instruction", "question", "query")
ANSWERS = ("response", "completion", "output", "answer")


def sniff(record: Mapping[str, Any]) -> int:
    """Whether a record has a column of each."""
    return int(all(any(record.get(n) for n in names) for names in (PROMPTS, ANSWERS)))


def convert(record: dict[str, Any], source: Source) -> dict[str, Any]:
    """A record in our own form.

    Raises:
        DataError: it is not in this format.
    """
    asked, answer = (_column(record, names, source) for names in (PROMPTS, ANSWERS))
    further = record.get("input") if asked == "instruction" else None
    beside = ("input", "system", "history")
    taken = ("messages", asked, answer, *beside, *media.columns(record))
    rest = {key: value for key, value in record.items() if key not in taken}
    found = Asked(
        (asked, record[asked]),
        (answer, record[answer]),
        further=further,
        system={"system": record.get("system")},
        history=history(record, "history", source),
        words=media.words(record, plural=True),
    )
    return {**rest, **found.written(media.listed(record, source))}


def history(record: Mapping[str, Any], name: str, source: Source) -> dict[str, Any]:
    """Questions and answers before the one that is asked, in turn, each with its place.

    Args:
        record: of the file.
        name: of the column, which may be missing.
        source: where it stands.

    Raises:
        DataError: the column holds something else.
    """
    found = record.get(name) or []
    pairs = found if isinstance(found, list) else [found]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise DataError.at(
            source,
            got=f"{shown(found)} for {name!r}",
            expected='[["a question", "its answer"], ...]',
            do="correct it",
        )
    return {f"{name}[{n}][{m}]": pair[m] for n, pair in enumerate(pairs) for m in (0, 1)}


@dataclass(frozen=True)
class Asked:
    """What is asked and answered, each with the name of its column.

    Attributes:
        asked, answer: texts, or lists of messages.
        further: text that follows what is asked, on a line of its own.
        system: text, or nothing.
        history: questions and answers before, in turn.
        words: the file's own (`ds_lvx.data.conversation.Turn`).
    """

    asked: tuple[str, Any]
    answer: tuple[str, Any]
    further: Any = None
    system: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)

    def written(self, lists: Mapping[str, list[Any]]) -> dict[str, Any]:
        """A record in our own form.

        Args:
            lists: media by their column.
        """
        name, text = self.asked
        if isinstance(self.further, str) and self.further:
            text = f"{text}\n{self.further}"
        said = [
            self._turn({"role": ("user", "assistant")[n % 2], "content": each}, where)
            for n, (where, each) in enumerate(self.history.items())
        ]
        said += self._turns(name, text, "user") + self._turns(*self.answer, "assistant")
        texts = [str(message.get("content")) for message in said if message.get("role") == "user"]
        kinds = {column: column.removesuffix("s") for column in lists}
        if not any(f"<{kind}>" in each for kind in kinds.values() for each in texts):
            first = next((m for m in said if m.get("role") == "user"), None)
            if first is not None and isinstance(first["content"], str):
                media_parts = [{"type": kinds[column]} for column in lists for _ in lists[column]]
                parts = [{"type": "text", "text": first["content"]}] if first["content"] else []
                first["content"] = media_parts + parts if media_parts else first["content"]
        for key in self.system:
            said = turns.with_system(self.system, said, key)
        return {"messages": said, **lists}

    def _turns(self, name: str, value: Any, role: str) -> list[Turn]:
        if isinstance(value, list) and all(isinstance(each, dict) for each in value):
            return [self._turn(each, f"{name}[{n}]") for n, each in enumerate(value)]
        return [self._turn({"role": role, "content": value}, name)]

    def _turn(self, message: Mapping[str, Any], where: str) -> Turn:
        return Turn(message, where, self.words)


def _column(record: Mapping[str, Any], names: Sequence[str], source: Source) -> str:
    found = [name for name in names if record.get(name) is not None]
    if len(found) != 1:
        raise DataError.at(
            source,
            got=f"the columns {', '.join(found)}" if found else f"the keys {shown(sorted(record))}",
            expected=f"one of {', '.join(names)}",
            do="take the others out" if found else "add it, or say another --format",
        )
    return found[0]
