"""Conversations from a JSONL file in the usual chat format.

One JSON object a line::

    {"messages": [
      {"role": "user", "content": [
        {"type": "video", "video": "clips/a.mp4"},
        {"type": "image", "image": "frames/b.png"},
        {"type": "text", "text": "What happens?"}]},
      {"role": "assistant", "content": "A rabbit wakes up."}]}

Content that is a plain string is text. Paths are relative to the folder of the JSONL file. Other
keys of the object (an id, a licence) are left alone. Everything that can be checked without
opening an image or a video is checked when the file is read, every line of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_lvx.data.errors import DataError, Source

ROLES = ("system", "user", "assistant")
KINDS = ("text", "image", "video")
_EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}'


@dataclass(frozen=True)
class Part:
    """A piece of a message.

    Attributes:
        kind: ``"text"``, ``"image"`` or ``"video"``.
        value: the text, or the path of the file.
    """

    kind: str
    value: str


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part.value for part in self.parts if part.kind == "text")


@dataclass(frozen=True)
class Conversation:
    """One sample: a line of the file."""

    source: Source
    messages: tuple[Message, ...]

    @property
    def media(self) -> list[Part]:
        """Its images and videos, in the order of the text."""
        parts = [part for message in self.messages for part in message.parts]
        return [part for part in parts if part.kind != "text"]


def read_conversations(path: str | Path) -> list[Conversation]:
    """Read and check a JSONL file.

    Args:
        path: the file; blank lines are skipped.

    Returns:
        The conversations in the order of their lines, at least one.

    Raises:
        DataError: the file is missing or empty, a line is no JSON or not in the chat format, or a
            file that it names does not exist; the message begins with ``file:line``.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError.at(
            str(path), got="no such file", expected="a JSONL file of chats", do="check the path"
        )
    conversations = list(_conversations(file))
    if not conversations:
        raise DataError.at(
            str(path),
            got="an empty file",
            expected=f"at least one line such as {_EXAMPLE}",
            do="add samples to it",
        )
    return conversations


def _conversations(file: Path) -> Iterator[Conversation]:
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if raw.strip():
                yield _Line(Source(str(file), number), file.parent).conversation(raw)


@dataclass(frozen=True)
class _Line:
    """The checks of one line: each names the line when it fails."""

    source: Source
    folder: Path

    def conversation(self, raw: bytes) -> Conversation:
        try:
            record = json.loads(raw.decode("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            text = raw[:60].decode("utf-8", "replace").strip()
            raise self.error(f"{text!r} ({error})", "one JSON object", "correct the line") from None
        if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
            found = f"the keys {sorted(record)}" if isinstance(record, dict) else _name(record)
            raise self.error(found, f'a list "messages": {_EXAMPLE}', "rewrite the line")
        messages = tuple(self.message(item, n) for n, item in enumerate(record["messages"]))
        if not any(message.role == "assistant" and message.text.strip() for message in messages):
            raise self.error(
                f"roles {[message.role for message in messages]} and no assistant's text",
                "at least one assistant message with text, which is what is learnt",
                "add the answer",
            )
        return Conversation(self.source, messages)

    def message(self, item: Any, number: int) -> Message:
        where = f"messages[{number}]"
        if not isinstance(item, dict) or item.get("role") not in ROLES:
            found = f"role {item.get('role')!r}" if isinstance(item, dict) else _name(item)
            raise self.error(
                f"{found} in {where}", f"one of {', '.join(ROLES)}", "correct the role"
            )
        content = item.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise self.error(
                f"content {_name(content)} in {where}", "a string or a list", "correct the content"
            )
        parts = tuple(self.part(part, f"{where}.content[{n}]") for n, part in enumerate(content))
        if item["role"] == "assistant" and any(part.kind != "text" for part in parts):
            raise self.error(
                f"an image or a video in {where}", "text alone from the assistant", "move it"
            )
        return Message(item["role"], parts)

    def part(self, item: Any, where: str) -> Part:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind not in KINDS:
            found = f"type {kind!r}" if isinstance(item, dict) else _name(item)
            raise self.error(f"{found} in {where}", f'"type" one of {KINDS}', "correct the type")
        value = item.get(kind)
        if not isinstance(value, str):
            raise self.error(
                f"{_name(value)} for {kind!r} in {where}",
                f'{{"type": "{kind}", "{kind}": "..."}}',
                "correct the entry",
            )
        if kind == "text":
            return Part(kind, value)
        return Part(kind, str(self.media_file(value, where)))

    def media_file(self, value: str, where: str) -> Path:
        if value.startswith("data:"):
            raise self.error(
                f"a picture written out, {_cut(value)!r}, in {where}",
                "the path of a file",
                "write what it holds into a file of its own (base64 -d), and name that",
            )
        if "://" in value:
            raise self.error(
                f"the address {_cut(value)!r} in {where}", "a local file", "download it first"
            )
        file = self.folder / value
        # os.path, unlike Path, also answers for names that no file system can hold.
        if not os.path.isfile(file):
            found = "a folder" if os.path.isdir(file) else "no such file"
            raise self.error(
                f"{found}: {_cut(str(file))} ({where})",
                f"a path relative to {self.folder} or an absolute one",
                "correct the path",
            )
        return file

    def error(self, got: str, expected: str, do: str) -> DataError:
        return DataError.at(self.source, got=got, expected=expected, do=do)


def _cut(text: str) -> str:
    """A value that a message can hold: its beginning and its end."""
    return text if len(text) <= 200 else f"{text[:80]}...{text[-40:]}"


def _name(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
