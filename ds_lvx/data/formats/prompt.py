"""A question and its answer in two columns, with media in others.

The names are those of TRL (``prompt``, ``completion``; lists of messages too), Alpaca
(``instruction``, ``input``, ``output``) and their like. Where the question has no placeholder, the
media come before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    taken = ("messages", asked, answer, "input", "system", *media.columns(record))
    rest = {key: value for key, value in record.items() if key not in taken}
    return {
        **rest,
        **written(
            record[asked],
            record[answer],
            further=further,
            system=record.get("system"),
            lists=media.listed(record, source),
        ),
    }


def written(
    asked: Any,
    answer: Any,
    *,
    further: Any = None,
    system: Any = None,
    history: Sequence[tuple[Any, Any]] = (),
    lists: Mapping[str, list[Any]],
) -> dict[str, Any]:
    """A record in our own form.

    Args:
        asked, answer: texts, or lists of messages.
        further: text that follows what is asked, on a line of its own.
        system: text, or nothing.
        history: questions and answers before.
        lists: media by their column.
    """
    if isinstance(further, str) and further:
        asked = f"{asked}\n{further}"
    before = [text for pair in history for text in pair]
    said = [
        {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(before)
    ]
    said += _messages(asked, "user") + _messages(answer, "assistant")
    texts = [str(message.get("content")) for message in said if message.get("role") == "user"]
    kinds = {name: name.removesuffix("s") for name in lists}
    if not any(f"<{kind}>" in text for kind in kinds.values() for text in texts):
        first = next((m for m in said if m.get("role") == "user"), None)
        if first is not None and isinstance(first["content"], str):
            media_parts = [{"type": kinds[name]} for name in lists for _ in lists[name]]
            text = [{"type": "text", "text": first["content"]}] if first["content"] else []
            first["content"] = media_parts + text if media_parts else first["content"]
    return {"messages": turns.with_system({"system": system}, said), **lists}


def _messages(value: Any, role: str) -> list[dict[str, Any]]:
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        return [dict(each) for each in value]
    return [{"role": role, "content": value}]


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
