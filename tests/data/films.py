"""Films of every kind, made by PyAV's encoders: a few dozen, tiny, each with its own trap."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType

WIDTH, HEIGHT, FRAMES, RATE, GOP = 64, 48, 24, 10, 8


def drawing(index: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray[Any, Any]:
    """Frame ``index``: a ramp that moves, and a grey square that tells the number."""
    width, height = size
    x, y = np.arange(width), np.arange(height)[:, None]
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = (3 * x + 5 * index) % 256
    picture[..., 1] = (4 * y + x + 7 * index) % 256
    picture[..., 2] = 10 * index % 256
    picture[: height // 2, : width // 2] = 10 * index % 256
    return picture


@dataclass(frozen=True)
class Kind:
    """How to make a film.

    Attributes:
        name: of the file; its ending picks the container.
        codec: FFmpeg's name of the encoder.
        pixels: its pixel format.
        options: of the encoder.
        muxing: of the container.
        size, rate: of the pictures.
        times: of the frames, where they are not even.
        setup: what is done to the stream before the first frame.
        source: the pixel format that drawings are made in, and ``draw`` changes.
        draw: what is done to a frame before it is encoded.
        title: of the film.
    """

    name: str
    codec: str
    pixels: str = "yuv420p"
    options: Mapping[str, str] = field(default_factory=dict)
    muxing: Mapping[str, str] = field(default_factory=dict)
    size: tuple[int, int] = (WIDTH, HEIGHT)
    rate: int = RATE
    times: Callable[[int], int] | None = None
    setup: Callable[[Any], None] | None = None
    source: str = "rgb24"
    draw: Callable[[Any], None] | None = None
    title: str | None = None


def write(folder: Path, kind: Kind) -> Path:
    """Encode ``FRAMES`` drawings."""
    path = folder / kind.name
    with av.open(str(path), "w", options=dict(kind.muxing)) as container:
        if kind.title is not None:
            container.metadata["title"] = kind.title
        stream = container.add_stream(kind.codec, rate=kind.rate, options=dict(kind.options))
        stream.width, stream.height = kind.size
        stream.pix_fmt = kind.pixels
        stream.codec_context.gop_size = int(kind.options.get("g", GOP))
        if kind.setup is not None:
            kind.setup(stream)
        for index in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(drawing(index, kind.size), "rgb24")
            frame = frame.reformat(format=kind.source)
            frame.pts = index if kind.times is None else kind.times(index)
            frame.time_base = Fraction(1, kind.rate)
            frame.pict_type = PictureType.NONE
            if kind.draw is not None:
                kind.draw(frame)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def remux(
    source: Path,
    target: Path,
    *,
    change: Callable[[int, Any], Any] = lambda index, packet: packet,
    **options: Any,
) -> Path:
    """Put packets into another container; ``change`` gets each with its number, None drops it."""
    with av.open(str(source)) as read, av.open(str(target), "w", **options) as written:
        stream = read.streams.video[0]
        copy = written.add_stream_from_template(stream)
        packets = [packet for packet in read.demux(stream) if packet.size > 0]
        for index, packet in enumerate(packets):
            changed = change(index, packet)
            if changed is not None:
                changed.stream = copy
                written.mux(changed)
    return target


def plain(path: Path) -> list[Any]:
    """Every picture that a plain decoder gives, one after the other."""
    with av.open(f"file:{path}", metadata_errors="replace") as container:
        return [frame.to_image() for frame in container.decode(video=0)]
