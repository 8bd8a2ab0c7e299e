"""LLaVA's: ``{"image": "a.png", "conversations": [{"from": "human", "value": "<image>..."}]}``.

``image`` and ``video`` are a path or a list of paths. Where a record has a video and no image,
``<image>`` stands for the video, as in LLaVA's own sets of videos.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_lvx.data.errors import Source
from ds_lvx.data.formats import media, turns


def sniff(record: Mapping[str, Any]) -> int:
    """Whether a record has turns, and an ``image`` or a ``video`` beside them."""
    has_turns = isinstance(record.get("conversations"), list)
    return 2 * int(has_turns and any(record.get(kind) for kind in media.KINDS))


def convert(record: dict[str, Any], source: Source) -> dict[str, Any]:
    """A record in our own form.

    Raises:
        DataError: it is not in this format.
    """
    words = media.words(record, plural=False)
    said = turns.messages(record, source, key="conversations", tags=turns.Tags(), words=words)
    lists = media.listed(record, source)
    asked = [message for message in said if message["role"] == "user"]
    names_videos = any("<video>" in message["content"] for message in asked)
    if "videos" in lists and "images" not in lists and not names_videos:
        for message in asked:
            message["content"] = message["content"].replace("<image>", "<video>")
            message.words["<video>"] = "<image>"
    taken = ("conversations", "system", *media.columns(record))
    rest = {key: value for key, value in record.items() if key not in taken}
    return {**rest, "messages": turns.with_system(record, said), **lists}
