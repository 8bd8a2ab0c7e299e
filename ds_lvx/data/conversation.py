"""A sample: what is said, by whom, and the images and videos in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ds_lvx.data.errors import Source
from ds_lvx.data.held import Held, Stills

ROLES = ("system", "user", "assistant")
KINDS = ("text", "image", "video")


@dataclass(frozen=True)
class Part:
    """A piece of a message.

    Attributes:
        kind: ``"text"``, ``"image"`` or ``"video"``.
        value: the text, or the path of the file.
        fps: frames a second of this video; None leaves it to the run.
        nframes: frames of this video in all; None leaves it to the run.
        start, end: seconds of this video, of which the part between is taken; None: its beginning,
            its end.
        pixels: least and most that a picture is to have for the model; None leaves it to that.
        held: the medium, where it has no file of its own, or one a frame; ``value`` then is what
            messages call it.
    """

    kind: str
    value: str
    fps: float | None = None
    nframes: int | None = None
    start: float | None = None
    end: float | None = None
    pixels: tuple[int | None, int | None] = (None, None)
    held: Held | Stills | None = None

    @property
    def file(self) -> str | Held | Stills:
        """Where a medium's bytes are."""
        return self.value if self.held is None else self.held


@dataclass(frozen=True)
class Medium:
    """An image or a video as a converter gives it (`ds_lvx.data.formats`).

    Attributes:
        file: a path, or the bytes that another file holds; of a video also a list of its frames'.
        more: what a part says beside the path: ``fps``, ``nframes``, ``sample_fps``,
            ``video_start``, ``video_end``, ``min_pixels``, ``max_pixels``.
        where: the column and the entry that it stands in; None: where our own form has it.
    """

    file: str | Held | Sequence[str | Held]
    more: Mapping[str, Any] = field(default_factory=dict)
    where: str | None = None


class Own(dict[str, Any]):
    """A record that is in our own form, whatever format the data set is in."""


class Turn(dict[str, Any]):
    """A message as a converter gives it, which knows where the file has it, and in what words.

    Args:
        message: in our own form.
        where: the column, and the entry in it.
        words: the file's own for ``image`` and ``video``, columns of media, and for ``<image>`` and
            ``<video>``, where they are not our own.
    """

    def __init__(
        self, message: Mapping[str, Any], where: str, words: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.where = where
        self.words = dict(words or {})


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of `ROLES`.
        parts: its text and media, in order.
        learnt: whether an assistant's text is learnt; a ``"weight"`` of 0 says no.
    """

    role: str
    parts: tuple[Part, ...]
    learnt: bool = True

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
