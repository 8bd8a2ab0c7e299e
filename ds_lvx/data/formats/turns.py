"""Turns as LLaVA and ShareGPT have them: ``{"from": "human", "value": "..."}``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_lvx.data.conversation import Turn
from ds_lvx.data.errors import DataError, Source, shown


@dataclass(frozen=True)
class Tags:
    """How turns are written.

    Attributes:
        role, content: keys of a turn.
        user, assistant, system: roles.
        tools: roles of turns that call tools and answer them, which are refused.
    """

    role: str = "from"
    content: str = "value"
    user: tuple[str, ...] = ("human", "user")
    assistant: tuple[str, ...] = ("gpt", "assistant", "chatgpt", "model")
    system: tuple[str, ...] = ("system",)
    tools: tuple[str, ...] = ("function_call", "observation", "function", "tool")

    @property
    def roles(self) -> dict[str, str]:
        """Ours, by theirs."""
        return {
            **dict.fromkeys(self.system, "system"),
            **dict.fromkeys(self.user, "user"),
            **dict.fromkeys(self.assistant, "assistant"),
        }


def messages(
    record: Mapping[str, Any],
    source: Source,
    *,
    key: str,
    tags: Tags,
    words: Mapping[str, str],
) -> list[Turn]:
    """The turns of a record as messages.

    Args:
        record: of the file.
        source: where it stands.
        key: of its list of turns.
        tags: how they are written.
        words: the file's own (`ds_lvx.data.conversation.Turn`).

    Raises:
        DataError: there is no such list, or a turn has an unknown role or no text.
    """
    turns = record.get(key)
    example = f'"{key}": [{{"{tags.role}": "{tags.user[0]}", "{tags.content}": "..."}}, ...]'
    if not isinstance(turns, list):
        raise DataError.at(
            source,
            got=f"the keys {shown(sorted(record))}",
            expected=f"a list {example}",
            do="add it, or say another --format",
        )
    places = {f"{key}[{n}]": turn for n, turn in enumerate(turns)}
    return [
        Turn(_message(turn, where, source, tags=tags), where, words)
        for where, turn in places.items()
    ]


def _message(turn: Any, where: str, source: Source, *, tags: Tags) -> dict[str, Any]:
    role = turn.get(tags.role) if isinstance(turn, dict) else None
    text = turn.get(tags.content) if isinstance(turn, dict) else None
    is_known = isinstance(role, str) and role in tags.roles
    if is_known and isinstance(text, str):
        rest = {key: turn[key] for key in ("weight",) if key in turn}
        return {"role": tags.roles[str(role)], "content": text, **rest}
    tools = "; tools are not read: write them out in the text" if role in tags.tools else ""
    known = ", ".join(tags.roles)
    if not isinstance(turn, dict):
        got, expected = f"{shown(turn)} for {where}", "an object"
    elif not is_known:
        got, expected = f"{tags.role} {shown(role)} in {where}", f"one of {known}"
    else:
        got, expected = f"{tags.content} {shown(text)} in {where}", "a string"
    raise DataError.at(source, got=got, expected=expected, do=f"correct the turn{tools}")


def with_system(record: Mapping[str, Any], messages: list[Turn], key: str = "system") -> list[Turn]:
    """Messages with the system text before them that stands beside the turns, if there is one."""
    said = record.get(key)
    words = messages[0].words if messages else None
    first = [Turn({"role": "system", "content": said}, key, words)] if said else []
    return [*first, *messages]
