"""Frames of a video, decoded with PyAV: only those asked for, and what must come before them.

`probe` reads the container without decoding a picture, so that every rank knows every frame's time
and size. `choose` picks frames by rate or count, the same on every rank. `decode` then produces the
pictures of one rank: it seeks to the keyframe before the first wanted frame, decodes from there,
and stops after the last one; where a keyframe lies between two wanted frames it jumps to it.

    keyframes    K . . . . . K . . . . . K . . . . .
    wanted           w w                     w
    decoded      d d d d                 d d d            (. . . . . of the middle: never read)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ds_lvx.data.images import check_size

if TYPE_CHECKING:
    from PIL.Image import Image

# Demuxers that make a "video" out of a text file or of a single picture.
_NO_VIDEO_FORMATS = ("tty", "image2")
_REPAIR = "replace it, or repair it with: ffmpeg -i {path} fixed.mp4"


@dataclass(frozen=True)
class Video:
    """What the container says about a video; nothing of it was decoded.

    Attributes:
        path: the file.
        timestamps: of every frame in order of display, in units of ``time_base``.
        keyframes: the timestamps at which decoding can begin, in order.
        time_base: seconds of one unit.
        width, height: pixels.
    """

    path: str
    timestamps: tuple[int, ...]
    keyframes: tuple[int, ...]
    time_base: Fraction
    width: int
    height: int

    def __len__(self) -> int:
        return len(self.timestamps)

    def seconds(self, index: int) -> float:
        """When frame ``index`` is shown, from the first frame on."""
        return float((self.timestamps[index] - self.timestamps[0]) * self.time_base)


@dataclass
class DecodeCount:
    """Frames that came out of the decoder, wanted or not."""

    frames: int = field(default=0)


def probe(path: str) -> Video:
    """Read a video's frame times and size without decoding a picture.

    Args:
        path: a file in any container that FFmpeg reads.

    Raises:
        ValueError: the file is missing, broken, no video, or larger than an image may be; the
            message names the file.
    """
    with _opened(path) as (container, stream):
        check_size(stream.width, stream.height)
        packets = [packet for packet in container.demux(stream) if packet.size > 0]
        shown = [packet for packet in packets if not packet.is_discard]
        if any(packet.pts is None for packet in shown):
            raise ValueError(
                f"got a stream without timestamps ({container.format.name}); expected a container "
                f"that has them; put it into one: ffmpeg -i {path} -c copy fixed.mp4"
            )
        timestamps = tuple(sorted({packet.pts for packet in shown}))
        keyframes = tuple(sorted({packet.pts for packet in packets if packet.is_keyframe}))
        if not timestamps or not keyframes:
            raise ValueError(f"got no frames; expected a video; {_REPAIR.format(path=path)}")
        return Video(path, timestamps, keyframes, stream.time_base, stream.width, stream.height)


def choose(video: Video, *, fps: float | None = None, count: int | None = None) -> tuple[int, ...]:
    """Pick frames, evenly in time or in number.

    Args:
        video: from `probe`.
        fps: frames a second: at every ``1 / fps`` seconds the frame that is shown then. A rate
            above the video's own gives every frame once.
        count: so many frames, from the middles of ``count`` equal parts; all of a shorter video.

    Returns:
        Indices of frames, increasing, at least one. Without ``fps`` and ``count``: every frame.

    Raises:
        ValueError: both are given, or one is not positive.
    """
    if fps is not None and count is not None:
        raise ValueError(f"got fps={fps} and count={count}; expected one of them; drop the other")
    if (fps is not None and fps <= 0) or (count is not None and count < 1):
        raise ValueError(f"got fps={fps}, count={count}; expected more than 0; correct it")
    total = len(video)
    if count is not None:
        return tuple(range(total)) if count >= total else _middles(total, count)
    if fps is None:
        return tuple(range(total))
    # Exact fractions: with floats, 25 frames a second miss frames of a 25-frame video.
    interval = 1 / (Fraction(str(fps)) * video.time_base)
    first, last = video.timestamps[0], video.timestamps[-1]
    steps = int((last - first) / interval)
    shown = {bisect_right(video.timestamps, first + k * interval) - 1 for k in range(steps + 1)}
    return tuple(sorted(shown))


def decode(
    video: Video, indices: Sequence[int], *, counter: DecodeCount | None = None
) -> Iterator[Image]:
    """Decode some frames of a video.

    Args:
        video: from `probe`.
        indices: which frames, increasing.
        counter: counts every frame that the decoder produced, the lead-in included.

    Yields:
        The frames in order, RGB, upright (phones store a rotation beside the picture).

    Raises:
        ValueError: a frame cannot be decoded; the message names the file and the frame.
    """
    counter = DecodeCount() if counter is None else counter
    with _opened(video.path) as (container, stream):
        for place, wanted in _runs(video, indices):
            # Some containers (MPEG-TS, AVI) seek past the place asked for: then ask for an
            # earlier keyframe, twice as far back each time.
            targets = [video.keyframes[max(place - back, 0)] for back in (0, 1, 2, 4, 8)]
            targets.append(min(video.timestamps[0], 0))
            frames = _frames_from(container, stream, targets, first=wanted[0])
            yield from _pick(frames, wanted, counter, time_base=video.time_base)


def _middles(total: int, count: int) -> tuple[int, ...]:
    return tuple((2 * k + 1) * total // (2 * count) for k in range(count))


def _runs(video: Video, indices: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Wanted timestamps, by the place of the keyframe from which decoding them begins."""
    runs: list[tuple[int, list[int]]] = []
    for index in indices:
        timestamp = video.timestamps[index]
        place = max(bisect_right(video.keyframes, timestamp) - 1, 0)
        if runs and runs[-1][0] == place:
            runs[-1][1].append(timestamp)
        else:
            runs.append((place, [timestamp]))
    return runs


def _pick(
    frames: Iterator[Any], wanted: list[int], counter: DecodeCount, *, time_base: Fraction
) -> Iterator[Image]:
    done = 0
    for frame in frames:
        counter.frames += 1
        if frame.pts == wanted[done]:
            yield frame.to_image().rotate(_rotation(frame), expand=True)
            done += 1
            if done == len(wanted):
                return
        elif frame.pts is not None and frame.pts > wanted[done]:
            break
    second = float(wanted[done] * time_base)
    raise ValueError(f"got no frame at {second:.3f} s; expected the one that the container lists")


def _rotation(frame: Any) -> int:
    """Degrees, counterclockwise, by which a picture has to be turned for display."""
    return int(frame.rotation)


def _frames_from(
    container: Any, stream: Any, targets: Sequence[int], *, first: int
) -> Iterator[Any]:
    """Decoded frames, from the first target that leads to one no later than ``first``."""
    for target in targets:
        container.seek(target, stream=stream, backward=True, any_frame=False)
        frames = container.decode(stream)
        frame = next(frames, None)
        if frame is not None and frame.pts is not None and frame.pts <= first:
            yield frame
            yield from frames
            return


@contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Any]]:
    import av

    try:
        with av.open(path) as container:
            name = container.format.name
            if name.startswith(_NO_VIDEO_FORMATS) or name.endswith("_pipe"):
                raise ValueError(
                    f"got a picture or text ({name}); expected a video; "
                    'give a picture as {"type": "image"}'
                )
            if not container.streams.video:
                raise ValueError("got no video stream; expected a video; replace the file")
            yield container, container.streams.video[0]
    except av.error.FileNotFoundError:
        raise ValueError(f"{path}: got no such file; expected a video; check the path") from None
    except av.FFmpegError as error:
        what = error.strerror or type(error).__name__
        raise ValueError(
            f"{path}: got a file that cannot be decoded ({what}); expected a video; "
            f"{_REPAIR.format(path=path)}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
