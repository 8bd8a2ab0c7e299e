"""LLaMA-Factory's ``dataset_info.json``: which file a data set is in, and what its columns mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_lvx.data.errors import DataError, Source, shown
from ds_lvx.data.formats import media, turns
from ds_lvx.data.formats.prompt import Asked, history

INFO = "dataset_info.json"
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_SHAREGPT = {"messages": "conversations"}
_MEDIA = ("images", "videos")
_COLUMNS = ("prompt", "query", "response", "history", "messages", "system", "tools", "audios")
_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag")
_TOOL_TAGS = ("observation_tag", "function_tag")
_KEYS = ("file_name", "formatting", "columns", "tags", "ranking", "split", "folder", "subset")


@dataclass(frozen=True)
class Columns:
    """Converts records by what an entry says of them.

    Attributes:
        is_alpaca: questions and answers; else turns.
        names: columns by what they hold.
        tags: how turns are written.
    """

    is_alpaca: bool
    names: Mapping[str, str]
    tags: turns.Tags = field(default_factory=turns.Tags)

    def __call__(self, record: dict[str, Any], source: Source) -> dict[str, Any]:
        """A record in our own form.

        Raises:
            DataError: a column is missing, or holds something else.
        """
        names = self.names
        needed = ("prompt", "response") if self.is_alpaca else ("messages",)
        missing = [names[key] for key in needed if record.get(names[key]) is None]
        if missing:
            raise DataError.at(
                source,
                got=f"the keys {shown(sorted(record))}",
                expected=f"the column {missing[0]!r}, which {INFO} names",
                do="add it, or correct the columns there",
            )
        beside = {key: record[names[key]] for key in ("tools", "audios") if names[key] in record}
        lists = media.listed({key: record.get(names[key]) for key in _MEDIA}, source, names)
        words = {key.removesuffix("s"): names[key] for key in _MEDIA}
        system = {names["system"]: record.get(names["system"])}
        if not self.is_alpaca:
            said = turns.messages(
                record, source, key=names["messages"], tags=self.tags, words=words
            )
            said = turns.with_system(system, said, names["system"])
            return {**beside, "messages": said, **lists}
        told = history(record, names["history"], source)
        asked = Asked(
            (names["prompt"], record[names["prompt"]]),
            (names["response"], record[names["response"]]),
            further=record.get(names["query"]),
            system=system,
            history=told,
            words=words,
        )
        return {**beside, **asked.written(lists)}


def entry(path: str, name: str | None) -> tuple[str, Callable[..., dict[str, Any]]]:
    """The file of a data set, and what converts its records.

    Args:
        path: of a ``dataset_info.json``.
        name: of the data set; None: there is one alone.

    Raises:
        DataError: there is no such entry, or it says what is not read here.
    """
    try:
        infos = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError.at(
            path, got=f"a file that cannot be read ({error})", expected="JSON", do="correct it"
        ) from None
    names = list(infos) if isinstance(infos, dict) else []
    chosen = names[0] if name is None and len(names) == 1 else name
    if chosen is None or not isinstance(infos.get(chosen) if names else None, dict):
        raise DataError.at(
            path,
            got="no name of a data set" if name is None else f"no data set {name!r}",
            expected=f"one of {shown(names)}",
            do=f"name it: {path}:{names[0] if names else 'NAME'}",
        )
    info = infos[chosen]
    where = f"{path}:{chosen}"
    _refuse(info, where)
    file = Path(path).parent / str(info["file_name"])
    return str(file), _columns(info, where)


def _columns(info: Mapping[str, Any], where: str) -> Columns:
    formatting = info.get("formatting", "alpaca")
    given, tags = (_names(info, key, where) for key in ("columns", "tags"))
    unknown = [key for key in given if key not in (*_COLUMNS, *_MEDIA)]
    unknown += [key for key in tags if key not in (*_TAGS, *_TOOL_TAGS)]
    if formatting not in ("alpaca", "sharegpt", "openai") or unknown:
        raise DataError.at(
            where,
            got=f"formatting {formatting!r}" if not unknown else f"the key {unknown[0]!r}",
            expected=f"alpaca, sharegpt or openai, columns {', '.join((*_COLUMNS, *_MEDIA))}",
            do="correct the entry",
        )
    names = {key: key for key in (*_COLUMNS, *_MEDIA)}
    if formatting == "alpaca":
        return Columns(True, {**names, **_ALPACA, **given})
    plain = turns.Tags()
    if formatting == "openai":
        names["messages"] = "messages"
        plain = turns.Tags("role", "content", ("user",), ("assistant",))
    else:
        names |= _SHAREGPT
    ours = turns.Tags(
        role=tags.get("role_tag", plain.role),
        content=tags.get("content_tag", plain.content),
        user=_tag(tags, "user_tag", plain.user),
        assistant=_tag(tags, "assistant_tag", plain.assistant),
        system=_tag(tags, "system_tag", plain.system),
        tools=(*plain.tools, *(tags[key] for key in _TOOL_TAGS if key in tags)),
    )
    return Columns(False, {**names, **given}, ours)


def _names(info: Mapping[str, Any], key: str, where: str) -> dict[str, str]:
    found = info.get(key) or {}
    if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
        raise DataError.at(
            where, got=f"{shown(found)} for {key!r}", expected="names", do="correct the entry"
        )
    return found


def _tag(tags: Mapping[str, str], key: str, default: tuple[str, ...]) -> tuple[str, ...]:
    return (tags[key],) if key in tags else default


def _refuse(info: Mapping[str, Any], where: str) -> None:
    """Raise for an entry whose data are elsewhere, or are no chats."""
    elsewhere = next((key for key in info if key.endswith("_hub_url") or key == "script_url"), None)
    others = [key for key, value in info.items() if key not in _KEYS and value is not None]
    if not isinstance(info.get("file_name"), str):
        got = "no file_name" if elsewhere is None else f"{elsewhere} {shown(info[elsewhere])}"
        do = "download the data set and write its file_name"
    elif info.get("ranking"):
        got, do = "a data set of rankings", "take another: preferences are not learnt here"
    elif others:
        got, do = f"the key {others[0]!r}", "take it out"
    else:
        return
    raise DataError.at(where, got=got, expected="a file of chats of this machine", do=do)
