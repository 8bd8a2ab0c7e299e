"""Our own: ``{"messages": [{"role": ..., "content": ...}], "images": [...], "videos": [...]}``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ds_lvx.data.errors import Source


def sniff(record: Mapping[str, Any]) -> int:
    """Whether a record has a list of messages, and none of OpenAI's parts in it."""
    return int(isinstance(record.get("messages"), list) and not any(map(_url, parts(record))))


def convert(record: dict[str, Any], source: Source) -> dict[str, Any]:
    """The record as it is."""
    return record


def parts(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The parts of messages that are objects."""
    listed = record.get("messages")
    for message in listed if isinstance(listed, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        listed_parts = content if isinstance(content, list) else ()
        yield from (part for part in listed_parts if isinstance(part, dict))


def _url(part: Mapping[str, Any]) -> bool:
    return part.get("type") in ("image_url", "video_url")
