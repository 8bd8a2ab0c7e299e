"""Small videos, images and JSONL files for the tests."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

BUNNY = Path(__file__).resolve().parent.parent / "assets" / "bigbuckbunny.mp4"


def write_video(path: Path, *, frames: int = 40, codec: str = "libx264", gop: int = 10) -> Path:
    """A video of plain grey frames, 64 x 48, 25 a second, with B-frames; frame i has grey 6 i."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = 2
        for index in range(frames):
            picture = np.full((48, 64, 3), 6 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return path


def write_image(path: Path, size: tuple[int, int] = (50, 40), colour: int = 90) -> Path:
    Image.new("RGB", size, (colour, 30, 200)).save(path)
    return path


def write_png_header(path: Path, width: int, height: int) -> Path:
    """A PNG of any size in a hundred bytes: what a decompression bomb looks like from outside."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def chat(*content: tuple[str, str], answer: str = "A rabbit.") -> dict[str, Any]:
    """One question and one answer; content is `("video", path)`, `("text", "...")`."""
    parts = [{"type": kind, kind: value} for kind, value in content]
    return {
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": answer},
        ]
    }


def write_jsonl(path: Path, *records: Any) -> Path:
    """One line a record; a string is written as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines))
    return path
