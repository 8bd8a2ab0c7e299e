"""A record in our own form, read into a conversation: what it says is honoured or refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ds_lvx.data.beside import beside
from ds_lvx.data.conversation import KINDS, ROLES, Conversation, Medium, Message, Part, Turn
from ds_lvx.data.errors import DataError, Source, shown
from ds_lvx.data.held import Held, Stills
from ds_lvx.data.paths import PathError, media_file

_EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}'
_MESSAGE_KEYS = ("role", "content", "weight")
_RATES = ("fps", "nframes", "video_start", "video_end", "sample_fps")
_SIZES = ("min_pixels", "max_pixels")
_PART_KEYS = {
    "text": ("type", "text", "literal"),
    "image": ("type", "image", *_SIZES),
    "video": ("type", "video", *_RATES, *_SIZES),
}
_PLACEHOLDER = re.compile("<(image|video)>")
_FPS = (1e-4, 1000)
_NFRAMES = (1, 1_000_000)
_SECONDS = (0, 1_000_000)
_PIXELS = (1, 1_000_000_000)
_BOUNDS = {
    "fps": _FPS,
    "nframes": _NFRAMES,
    "video_start": _SECONDS,
    "video_end": _SECONDS,
    "sample_fps": _FPS,
    **dict.fromkeys(_SIZES, _PIXELS),
}
_WHOLE = ("nframes", *_SIZES)


@dataclass(frozen=True)
class Line:
    """The checks of one line: each names the line when it fails.

    Args:
        source: where it stands.
        folder: that relative paths begin in.
    """

    source: Source
    folder: Path
    media: dict[str, Iterator[tuple[str, Part]]] = field(default_factory=dict)

    def conversation(self, record: dict[str, Any]) -> Conversation:
        if not isinstance(record.get("messages"), list):
            found = f"the keys {shown(sorted(record))}"
            raise self.error(
                found, f'a list "messages": {_EXAMPLE}', "rewrite the line, or say its --format"
            )
        if (unheard := beside(record)) is not None:
            raise self.error(unheard[0], "messages, images and videos", unheard[1])
        for kind in ("image", "video"):
            self.media[kind] = iter(self.listed(record, kind))
        messages_given = record["messages"]
        messages = tuple(self.message(item, n) for n, item in enumerate(messages_given))
        for kind, left in self.media.items():
            for where, part in left:
                sign = _words(messages_given).get(f"<{kind}>", f"<{kind}>")
                raise self.error(
                    f"{shown(part.value)} in {where} without a {sign} in the text",
                    f"one {sign} for each",
                    f"write {sign} where it belongs in the text",
                )
        if not any(m.role == "assistant" and m.learnt and m.text.strip() for m in messages):
            raise self.error(
                f"roles {shown([m.role for m in messages])} and no assistant's text that is learnt",
                "at least one assistant message with text (and not of weight 0)",
                "add the answer",
            )
        return Conversation(self.source, messages)

    def listed(self, record: dict[str, Any], kind: str) -> list[tuple[str, Part]]:
        """The media beside the messages, and where the file has each."""
        values = record.get(f"{kind}s")
        if values is None:
            return []
        if not isinstance(values, list) or not all(is_medium(kind, value) for value in values):
            found = f'{shown(values)} for "{kind}s"'
            raise self.error(found, f'"{kind}s": ["a path", ...]', "correct the list")
        places = [getattr(v, "where", None) or f"{kind}s[{n}]" for n, v in enumerate(values)]
        return [(w, self.named(kind, v, w)) for w, v in zip(places, values, strict=True)]

    def named(self, kind: str, value: Any, where: str) -> Part:
        """A medium where its file is named, or its files."""
        medium = value if isinstance(value, Medium) else Medium(value)
        if isinstance(medium.file, Held):
            part = Part(kind, medium.file.name, held=medium.file)
        elif isinstance(medium.file, str):
            part = Part(kind, self.file(medium.file, where))
        else:
            stills = self.stills(medium.file, where)
            part = Part(kind, str(stills), held=stills)
        return self.timed(part, medium.more, where)

    def stills(self, files: Sequence[Any], where: str) -> Stills:
        """A video as a list of its frames."""
        if not files:
            found = f"a video without frames in {where}"
            raise self.error(found, '["1.jpg", "2.jpg", ...]', "name them, or take the video out")
        named: list[str | Held] = []
        for number, file in enumerate(files):
            place = f"{where}[{number}]"
            if not isinstance(file, str | Held):
                found = f"{_name(file)} for {place}"
                raise self.error(found, "the path of a frame's image", "correct the list")
            named.append(file if isinstance(file, Held) else self.file(file, place))
        return Stills(tuple(named))

    def timed(self, part: Part, item: Mapping[str, Any], where: str) -> Part:
        """A medium with what an entry says of its frames."""
        part = self.sized(part, item, where)
        fps, nframes, start, end, taken = (self.number(item, key, where) for key in _RATES)
        if isinstance(part.held, Stills):
            if None not in (fps, taken) and fps != taken:
                found = f"fps {fps} and sample_fps {taken} in {where}"
                raise self.error(found, "the rate at which the frames were taken", "drop one")
            rate = fps if taken is None else taken
            if rate is not None:
                part = replace(part, held=replace(part.held, fps=rate))
            fps = None
        elif taken is not None:
            found = f"sample_fps in {where}, of a video that is no list of frames"
            raise self.error(found, "fps", "write fps, or list the frames")
        if fps is not None and nframes is not None:
            raise self.error(f"fps and nframes in {where}", "one of them", "drop the other")
        if end is not None and end <= (start or 0):
            found = f"video_start {start} and video_end {end} in {where}"
            raise self.error(found, "the end after the start, in seconds", "correct them")
        said = {"fps": fps, "nframes": nframes, "start": start, "end": end}
        return replace(part, **{key: value for key, value in said.items() if value is not None})

    def sized(self, part: Part, item: Mapping[str, Any], where: str) -> Part:
        """A medium with what an entry says of its pixels."""
        least, most = (self.number(item, key, where) for key in _SIZES)
        if None not in (least, most) and least > most:
            found = f"min_pixels {least} and max_pixels {most} in {where}"
            raise self.error(found, "the most above the least", "correct them")
        return part if least is most is None else replace(part, pixels=(least, most))

    def message(self, item: Any, number: int) -> Message:
        where = item.where if isinstance(item, Turn) else f"messages[{number}]"
        if not isinstance(item, dict) or item.get("role") not in ROLES:
            found = f"role {shown(item.get('role'))}" if isinstance(item, dict) else _name(item)
            raise self.error(
                f"{found} in {where}", f"one of {', '.join(ROLES)}", "correct the role"
            )
        role, content = item["role"], item.get("content")
        self.refuse_others(item, _MESSAGE_KEYS, where, do='; "weight": 0 leaves an answer unlearnt')
        is_text = isinstance(content, str)
        if is_text:
            content = [{"type": "text", "text": content, "literal": role == "assistant"}]
        if not isinstance(content, list):
            raise self.error(
                f"content {_name(content)} in {where}", "a string or a list", "correct the content"
            )
        places = [f"{where}.content[{n}]" for n in range(len(content))]
        if is_text:
            places = [where if isinstance(item, Turn) else f"{where}.content"]
        parts = tuple(
            part
            for given, place in zip(content, places, strict=True)
            for part in self.parts(given, place, words=_words([item]))
        )
        if role == "assistant" and any(part.kind != "text" for part in parts):
            raise self.error(
                f"an image or a video in {where}", "text alone from the assistant", "move it"
            )
        return Message(role, parts, self.learnt(item, where))

    def learnt(self, item: dict[str, Any], where: str) -> bool:
        weight, answers = item.get("weight"), item["role"] == "assistant"
        if weight is None or (weight == 1 and answers and weight is not True):
            return True
        if weight == 0 and weight is not False:
            return False
        expected = "0 or 1 (the default)" if answers else "0: only the assistant's text is learnt"
        raise self.error(f"weight {shown(weight)} in {where}", expected, "correct the weight")

    def parts(self, item: Any, where: str, *, words: Mapping[str, str]) -> Iterator[Part]:
        """What an entry of the content says: one part, or a text cut at its placeholders."""
        kind = item.get("type") if isinstance(item, dict) else None
        if kind not in KINDS:
            found = f"type {shown(kind)}" if isinstance(item, dict) else _name(item)
            raise self.error(f"{found} in {where}", f'"type" one of {KINDS}', "correct the type")
        self.refuse_others(item, _PART_KEYS[kind], where)
        if kind != "text":
            yield self.medium(item, kind, where, words=words)
            return
        if not isinstance(item.get("text"), str):
            example = '{"type": "text", "text": "..."}'
            found = f"{_name(item.get('text'))} for 'text' in {where}"
            raise self.error(found, example, "correct the entry")
        text = self.text(item["text"], where)
        # Text, kind, text, kind, text: every second piece is what a placeholder stands for.
        for n, piece in enumerate(
            [text] if self.literal(item, where) else _PLACEHOLDER.split(text)
        ):
            if n % 2:
                sign = words.get(f"<{piece}>", f"<{piece}>")
                yield self.beside(piece, f"{sign} in {where}", words=words)
            elif piece or not text:
                yield Part("text", piece)

    def medium(
        self, item: dict[str, Any], kind: str, where: str, *, words: Mapping[str, str]
    ) -> Part:
        """An image or a video, named here or, where the entry has no path, beside the messages."""
        value = item.get(kind)
        if value is not None and not is_medium(kind, value):
            example = f'{{"type": "{kind}", "{kind}": "..."}}'
            found = f"{_name(value)} for {kind!r} in {where}"
            do = "give each as an image" if isinstance(value, list) else "correct the entry"
            raise self.error(found, example, do)
        if value is None:
            part = self.beside(kind, f"{kind!r} without a path in {where}", words=words)
        else:
            part = self.named(kind, value, f"{where}.{kind}" if isinstance(value, list) else where)
        return self.timed(part, item, where)

    def beside(self, kind: str, said: str, *, words: Mapping[str, str]) -> Part:
        """The next of the media beside the messages."""
        found = next(self.media[kind], None)
        if found is None:
            column = words.get(kind)
            raise self.error(
                f"{said} and no {kind} left for it",
                f'a list "{kind}s" beside the messages with a path for each'
                if column is None
                else f'a path for each in "{column}"',
                f'add the path (or, where <{kind}> is meant as text, write {{"type": "text", '
                '"text": "...", "literal": true})'
                if column is None
                else "add the path, or take the placeholder out",
            )
        return found[1]

    def literal(self, item: dict[str, Any], where: str) -> bool:
        literal = item.get("literal")
        if literal is not None and not isinstance(literal, bool):
            raise self.error(f"literal {shown(literal)} in {where}", "true or false", "correct it")
        return bool(literal)

    def number(self, item: Mapping[str, Any], key: str, where: str) -> Any:
        value, (low, high) = item.get(key), _BOUNDS[key]
        kinds: Any = int if key in _WHOLE else (int, float)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            expected = f"{'a whole' if kinds is int else 'a'} number from {low} to {high:,}"
            raise self.error(f"{key} {shown(value)} in {where}", expected, "correct it")
        return value

    def text(self, value: str, where: str) -> str:
        """A text that can be written as UTF-8: JSON can say half of a character."""
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"half a character (\\u{ord(value[error.start]):x}) in {where}"
            raise self.error(half, "whole ones", "write the text again, uncut") from None
        return value

    def file(self, value: str, where: str) -> str:
        try:
            return str(media_file(self.text(value, where), self.folder))
        except PathError as error:
            got, expected, do = error.args
            raise self.error(f"{got} ({where})", expected, do) from None

    def refuse_others(
        self, item: dict[str, Any], keys: tuple[str, ...], where: str, *, do: str = ""
    ) -> None:
        for key, value in item.items():
            if key not in keys and value is not None:
                known = ", ".join(keys)
                raise self.error(f"the key {shown(key)} in {where}", known, f"take it out{do}")

    def error(self, got: str, expected: str, do: str) -> DataError:
        return DataError.at(self.source, got=got, expected=expected, do=do)


def is_medium(kind: str, value: Any) -> bool:
    """Whether a value names an image or a video: a path, or of a video a list of its frames'."""
    return isinstance(value, (str, Held, Medium)) or (kind == "video" and isinstance(value, list))


def _words(messages: Sequence[Any]) -> Mapping[str, str]:
    """What the file calls media and placeholders, where its form is not our own."""
    return next((each.words for each in messages if isinstance(each, Turn)), {})


def _name(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {shown(value)}"
