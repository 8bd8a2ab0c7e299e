"""The same sample in our own form and in others, and what a data set says."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from ds_lvx.data.chat import Chats
from ds_lvx.data.held import Held, Stills
from tests.data.media import write_image, write_jsonl, write_video

ASKED, ANSWER = "Which colour?", "Red."


def own(
    text: str = f"<image>{ASKED}", *, system: str | None = None, **lists: Any
) -> dict[str, Any]:
    first = [] if system is None else [{"role": "system", "content": system}]
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": ANSWER}]
    return {"messages": [*first, *turns], **(lists or {"images": ["a.png"]})}


def turns(text: str = f"<image>{ASKED}", **more: Any) -> dict[str, Any]:
    said = [{"from": "human", "value": text}, {"from": "gpt", "value": ANSWER}]
    return {"id": "7", "conversations": said, **more}


def parts(*asked: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": [*asked]}, own()["messages"][-1]]}


def url(value: str, key: str = "image_url") -> dict[str, Any]:
    return {"type": key, key: {"url": value, "detail": "auto"}}


def text(value: str = ASKED) -> dict[str, Any]:
    return {"type": "text", "text": value}


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def said(chats: Chats) -> list[Any]:
    """Of every sample each message with its parts, media by their bytes."""

    def content(part: Any) -> Any:
        if part.kind == "text":
            return part.value
        if isinstance(part.file, Stills):
            return part.file.fps, [held(file) for file in part.file.files]
        return held(part.file)

    def held(file: Any) -> bytes:
        return file.read() if isinstance(file, Held) else Path(file).read_bytes()

    return [
        [
            (m.role, m.learnt, [(p.kind, content(p), p.fps, p.start, p.end) for p in m.parts])
            for m in chats[index].messages
        ]
        for index in range(len(chats))
    ]


def expected(folder: Path, *records: dict[str, Any]) -> list[Any]:
    return said(Chats(write_jsonl(folder / "own.jsonl", *records)))


PART = {"path": "c.mp4", "start": "00:00:00.4", "end": 1.2}
OWN_PART = {"type": "video", "video": "c.mp4", "video_start": 0.4, "video_end": 1.2}
VIDEO = {"type": "video", "video": "c.mp4"}
IMAGE = {"type": "image", "image": "a.png"}
FRAMES = ["a.png", "b.png", "a.png"]
STILLS = {"type": "video", "video": FRAMES, "sample_fps": 4}


def write_media(folder: Path) -> Path:
    """Two pictures and a film of 40 frames, 25 a second."""
    write_image(folder / "a.png")
    write_image(folder / "b.png", colour=5)
    write_video(folder / "c.mp4")
    return folder
