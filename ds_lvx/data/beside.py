"""What records say beside their messages about what is to be learnt; it is not passed over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_lvx.data.errors import shown

# What to write instead.
_INSTEAD = {
    **dict.fromkeys(
        ("image", "video"), 'write a list "images" or "videos", and <image> or <video>'
    ),
    **dict.fromkeys(("audio", "audios"), "take the line out: sound is not read"),
    **dict.fromkeys(("video_start", "video_end"), "write it into the entry of the video"),
    "system": "write it as the first message, of the role system",
    "history": "write its questions and answers as messages",
    **dict.fromkeys(("tools", "functions"), "write them out in the text of a message"),
    "objects": "write the boxes out in the text of a message",
    **dict.fromkeys(("rejected", "rejected_response", "rejected_messages"), "take it out"),
    **dict.fromkeys(("weight", "loss"), 'write "weight" 0 or 1 into the assistant\'s messages'),
}
# Of good and of bad answers, in data for KTO. Other words there are of something else.
_VERDICTS = ("label", "kto_tag")
_EMPTY_JSON = ("", "[]", "{}")


def beside(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """What a record in our own form says that would not be acted on, and what to do.

    Args:
        record: with its messages.

    Returns:
        Words for an error: what was got, and what to write instead; None: there is nothing.
    """
    for key, do in _INSTEAD.items():
        if not _is_empty(record.get(key)):
            return f"the key {key!r} beside the messages", do
    for key in _VERDICTS:
        if record.get(key) is False:
            found = f"{key} {shown(False)} beside the messages, of an answer that is not wanted"
            return found, "take the sample out: every answer is learnt"
    return None


def _is_empty(value: Any) -> bool:
    """Whether a value says nothing, as ``"[]"`` of LLaMA-Factory's tools or no boxes."""
    if isinstance(value, dict):
        return all(_is_empty(each) for each in value.values())
    if isinstance(value, str):
        return value.strip() in _EMPTY_JSON
    return value is None or value == []
