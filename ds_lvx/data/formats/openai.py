"""OpenAI's messages: ``{"type": "image_url", "image_url": {"url": ...}}`` in the content.

A URL is a path, a ``file:`` or a ``data:`` URL; ``video_url`` likewise, as servers have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_lvx.data.conversation import Medium
from ds_lvx.data.errors import DataError, Source, shown
from ds_lvx.data.formats import messages
from ds_lvx.data.held import of_data_url
from ds_lvx.data.paths import cut

_KINDS = {"image_url": "image", "video_url": "video"}
_ROLES = {"developer": "system"}


def sniff(record: Mapping[str, Any]) -> int:
    """Whether a record has a part that is a URL."""
    return 2 * any(part.get("type") in tuple(_KINDS) for part in messages.parts(record))


def convert(record: dict[str, Any], source: Source) -> dict[str, Any]:
    """A record in our own form.

    Raises:
        DataError: a URL is missing, or holds no data.
    """
    given = record.get("messages")
    if not isinstance(given, list):
        return record  # what is wrong with it is said of our own form
    return {**record, "messages": [_message(m, n, source) for n, m in enumerate(given)]}


def _message(message: Any, number: int, source: Source) -> Any:
    if not isinstance(message, dict):
        return message
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        content = [
            _part(part, f"messages[{number}].content[{n}]", source)
            for n, part in enumerate(content)
        ]
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    return {**message, "role": role, "content": content}


def _part(part: Any, where: str, source: Source) -> Any:
    key = part.get("type") if isinstance(part, dict) else None
    if key not in tuple(_KINDS):  # it may be anything
        return part
    value = part.get(key)
    asked = value if isinstance(value, dict) else {"url": value}
    url = asked.get("url")
    others = {k for k, v in asked.items() if k != "url" and v is not None and v not in _DETAILS}
    others |= {k for k, v in part.items() if k not in ("type", key) and v is not None}
    if not isinstance(url, str) or others:
        raise DataError.at(
            source,
            got=f"{key} {shown(value)} in {where}"
            + (f", with {', '.join(sorted(others))}" if others else ""),
            expected=f'{{"type": "{key}", "{key}": {{"url": "..."}}}}',
            do="correct the entry",
        )
    kind = _KINDS[key]
    if not url.startswith("data:"):
        return {"type": kind, kind: url}
    try:
        return {"type": kind, kind: Medium(of_data_url(url))}
    except ValueError as error:
        raise DataError.at(
            source,
            got=f"{cut(url, 40)!r} in {where}: {error}",
            expected="data:image/png;base64,...",
            do="write the data again, or name a file",
        ) from None


_DETAILS = ("auto", "high")
"""Images come in full; ``"detail": "low"`` asks for less, which is refused."""
