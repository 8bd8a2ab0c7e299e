"""Our own: ``{"messages": [{"role": ..., "content": ...}], "images": [...], "videos": [...]}``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ds_lvx.data.errors import Source


def sniff(record: Mapping[str, Any]) -> int:
    """Whether a record has a list of messages, and none of OpenAI's parts in it."""
    return int(isinstance(record.get("messages"), list) and not any(map(_url, parts(record))))


def convert(record: dict[str, Any], source: Source) -> dict[str, Any]:
    """The record as it is, but that ``path`` and ``url`` of an image or a video, as transformers'
    chat templates have them, are called as its type."""
    listed = record.get("messages")
    if not any(_named(part) for part in parts(record)):
        return record
    assert isinstance(listed, list)  # it has such a part
    return {**record, "messages": [_message(each) for each in listed]}


def parts(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The parts of messages that are objects."""
    listed = record.get("messages")
    for message in listed if isinstance(listed, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        listed_parts = content if isinstance(content, list) else ()
        yield from (part for part in listed_parts if isinstance(part, dict))


def _message(message: Any) -> Any:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    return {**message, "content": [_renamed(part) for part in content]}


def _renamed(part: Any) -> Any:
    name = _named(part) if isinstance(part, dict) else None
    if name is None:
        return part
    return {**{key: part[key] for key in part if key != name}, part["type"]: part[name]}


def _named(part: Mapping[str, Any]) -> str | None:
    """The key of a medium's file, where it is not the type."""
    kind = part.get("type")
    if kind not in ("image", "video") or part.get(kind) is not None:
        return None
    return next((key for key in ("path", "url") if part.get(key) is not None), None)


def _url(part: Mapping[str, Any]) -> bool:
    return part.get("type") in ("image_url", "video_url")
