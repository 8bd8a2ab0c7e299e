"""Frames of a video, decoded with PyAV: only those asked for, and what must come before them.

`probe` finds every frame's time, the same on every rank: from the header or the packets where
these can be trusted, otherwise by decoding the film once (`ds_lvx.data.listing`). `choose` picks
frames by rate or count. `decode` then produces the pictures of one rank: it seeks to the keyframe
before the first wanted frame, decodes from there, and stops after the last one; where a keyframe
lies between two wanted frames it jumps to it.

    keyframes    K . . . . . K . . . . . K . . . . .
    wanted           w w                     w
    decoded      d d d d                 d d d            (. . . . . of the middle: never read)

A frame is the n-th that a player shows, whatever time it bears. After a jump its number is known by
the keyframe's time, and holds as long as every further frame is the next one listed; where one is
not, decoding begins again further ahead, in the end at the film's beginning. Frames of a film that
was decoded to be counted are counted again, always from the beginning.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ds_lvx.data.container import Film, decoded, opened, reencode
from ds_lvx.data.limits import DEFAULT_LIMITS, Limits, say_if_long
from ds_lvx.data.listing import counted, listed
from ds_lvx.data.shown import picture

if TYPE_CHECKING:
    from PIL.Image import Image

# Some containers (MPEG-TS) seek past the place asked for: then an earlier keyframe is asked for.
_KEYFRAMES_BACK = (0, 1, 2, 4, 8)
# Ends of segments are often rounded up.
_BEYOND_S = 1.0


@dataclass(frozen=True)
class Video:
    """What is known about a video before a picture of it is made.

    Attributes:
        path: the file.
        timestamps: of every frame in order of display, in units of ``time_base``, increasing.
        keyframes: the timestamps at which decoding can begin, in order.
        time_base: seconds of one unit.
        width, height: pixels, as stored.
        aspect: of a pixel, width by height; 1 where the file does not say.
        counted: the frames were found by decoding, and are found again by counting from the first.
    """

    path: str
    timestamps: array[int]
    keyframes: tuple[int, ...]
    time_base: Fraction
    width: int
    height: int
    aspect: Fraction = Fraction(1)
    counted: bool = False

    def __len__(self) -> int:
        return len(self.timestamps)

    def seconds(self, index: int) -> float:
        """When frame ``index`` is shown, from the first frame on."""
        return float((self.timestamps[index] - self.timestamps[0]) * self.time_base)


@dataclass
class DecodeCount:
    """Frames that were decoded to get at wanted ones, these included."""

    frames: int = 0


def probe(path: str, *, limits: Limits = DEFAULT_LIMITS) -> Video:
    """Find a video's frames and their times.

    Of an MP4 the header is read, of other containers every packet; a few frames at the beginning
    are decoded to see whether they are those listed. A film without times, or with times that say
    nothing of its frames, is decoded from beginning to end.

    Args:
        path: a local file in a container of `ds_lvx.data.container.FILMS`.
        limits: for the size of pictures, the number of frames and the gaps between them.

    Raises:
        ValueError: the file is missing, broken, cut off, no video, or above ``limits``; the message
            names the file.
    """
    found = listed(path, limits)
    if found is None:
        times = counted(path, limits)
        keyframes = tuple(times[:1])
    else:
        times, keyframes = found
    with opened(path, limits) as film:
        if not times:
            raise ValueError("got no frames; expected a video; replace the file")
        stream = film.stream
        _check_gaps(times, stream.time_base, limits)
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        return Video(
            path,
            times,
            keyframes,
            stream.time_base,
            stream.width,
            stream.height,
            aspect,
            counted=found is None,
        )


def _check_gaps(times: array[int], time_base: Fraction, limits: Limits) -> None:
    gap, index = max(((b - a, n) for n, (a, b) in enumerate(pairwise(times))), default=(0, 0))
    if gap * time_base > limits.max_gap_s:
        raise ValueError(
            f"got {float(gap * time_base):,.0f} s between frames {index} and {index + 1}; expected "
            f"at most {limits.max_gap_s:,.0f} s; cut the film there, or raise --max_gap_s"
        )


def choose(
    video: Video,
    *,
    fps: float | None = None,
    count: int | None = None,
    max_frames: int | None = None,
) -> tuple[int, ...]:
    """Pick frames, evenly in time or in number.

    Args:
        video: from `probe`.
        fps: frames a second: at every ``1 / fps`` seconds the frame that is shown then. A rate
            above the video's own gives every frame once, a gap in time none that is not there.
        count: so many frames, from the middles of ``count`` equal parts; all of a shorter video.
        max_frames: of those at ``fps``, or of all, no more than so many, from the middles of equal
            parts: "a frame a second, at most 64".

    Returns:
        Indices of frames, increasing, at least one. Without ``fps`` and ``count``: every frame.

    Raises:
        ValueError: ``count`` stands beside another, or one is not positive.
    """
    if count is not None and (fps is not None or max_frames is not None):
        raise ValueError(
            f"got fps={fps}, max_frames={max_frames} and count={count}; expected count by itself; "
            "drop the others"
        )
    rate_wrong = fps is not None and not (0 < fps < math.inf)
    if rate_wrong or any(number is not None and number < 1 for number in (count, max_frames)):
        raise ValueError(
            f"got fps={fps}, count={count}, max_frames={max_frames}; expected more than 0; "
            "correct it"
        )
    chosen = tuple(range(len(video))) if fps is None else _at_rate(video, fps)
    most = count if max_frames is None else max_frames
    if most is None or most >= len(chosen):
        return chosen
    return tuple(chosen[(2 * k + 1) * len(chosen) // (2 * most)] for k in range(most))


def segment(video: Video, start: float | None, end: float | None) -> range:
    """The frames that are shown in a part of a video, as if it were a film of its own.

    Args:
        video: from `probe`.
        start, end: seconds from the first frame on; None: its beginning, its end. The frame that is
            shown at ``start`` is the first, the last begins before ``end``.

    Raises:
        ValueError: no part of the video, or one that ends more than `_BEYOND_S` after it.
    """
    low, high = 0.0 if start is None else start, math.inf if end is None else end
    begins = [video.seconds(index) for index in range(len(video))]
    # What a text says is rounded; a frame that begins within a microsecond begins then.
    first = max(bisect_right(begins, low + 1e-6) - 1, 0)
    last = bisect_left(begins, high - 1e-6)
    length = begins[-1] + (begins[-1] / (len(begins) - 1) if len(begins) > 1 else 0.0)
    if not 0 <= low < high or low > length or (end is not None and end > length + _BEYOND_S):
        until = "its end" if end is None else f"{end:g} s"
        raise ValueError(
            f"{video.path}: got the part from {low:g} s to {until} of a video of {length:.2f} s; "
            f"expected 0 <= start < end <= {length:.2f}; correct the times"
        )
    return range(first, last)


def _at_rate(video: Video, fps: float) -> tuple[int, ...]:
    """The frames during which a multiple of ``1 / fps`` seconds falls; one look at every frame."""
    # Exact fractions: with floats, 25 frames a second miss frames of a 25-frame video.
    interval = 1 / (Fraction(str(fps)) * video.time_base)
    units, parts = interval.numerator, interval.denominator
    first, last = video.timestamps[0], video.timestamps[-1]
    begins = [(time - first) * parts for time in video.timestamps]
    ends = [*begins[1:], (last - first) * parts + 1]
    return tuple(
        index
        for index, (begin, end) in enumerate(zip(begins, ends, strict=True))
        if -(-begin // units) * units < end
    )


def decode(
    video: Video,
    indices: Sequence[int],
    *,
    counter: DecodeCount | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[Image]:
    """Decode some frames of a video.

    Args:
        video: from `probe`.
        indices: which frames, increasing.
        counter: counts every frame from where decoding began, the lead-in included.
        limits: for the size of pictures, and for what is decoded to get at them.

    Yields:
        The frames in order, RGB, as they are shown: upright (phones store a rotation beside the
        picture, and mirrors), with square pixels, what is transparent on white.

    Raises:
        ValueError: a frame cannot be decoded; the message names the file and the frame.
    """
    counter = DecodeCount() if counter is None else counter
    with opened(video.path, limits) as film:
        for place, wanted in _runs(video, indices):
            reader = _Reader(video, film, counter, limits)
            for index, frame in reader.found(place, wanted):
                try:
                    image = picture(frame, aspect=video.aspect, limits=limits)
                except ValueError as error:
                    raise ValueError(f"frame {index}: {error}") from None
                yield image


def _runs(video: Video, indices: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Wanted frames, by the place of the keyframe from which decoding them begins."""
    runs: list[tuple[int, list[int]]] = []
    for index in indices:
        place = max(bisect_right(video.keyframes, video.timestamps[index]) - 1, 0)
        if runs and runs[-1][0] == place:
            runs[-1][1].append(index)
        else:
            runs.append((place, [index]))
    return runs


@dataclass(frozen=True)
class _Reader:
    """Gets at the frames of one run, from the keyframe before them or from further ahead."""

    video: Video
    film: Film
    counter: DecodeCount
    limits: Limits

    def found(self, place: int, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Wanted frames with their numbers, in order."""
        left, passed = list(wanted), 0
        for target in self._targets(place):
            for index, frame in self._numbered(target, first=left[0]):
                self.counter.frames += 1
                if index != left[0]:
                    passed += 1
                    self._check_passed(passed, left[0])
                    continue
                yield index, frame
                passed = 0
                left.pop(0)
                if not left:
                    return
        raise ValueError(
            f"got no frame {left[0]}, at {self.video.seconds(left[0]):.3f} s, that follows those "
            "before it as the file lists them; expected one; replace the file, or keep what can be "
            f"decoded: {reencode(self.video.path)}"
        )

    def _targets(self, place: int) -> list[int | None]:
        """Where to begin, the nearest first; None is the beginning of the film."""
        if place == 0:
            return [None]
        keyframes = self.video.keyframes
        return [*(keyframes[place - back] for back in _KEYFRAMES_BACK if back <= place), None]

    def _frames(self, target: int | None) -> Iterator[Any]:
        import av

        if target is None:
            with opened(self.video.path, self.limits) as anew:
                yield from decoded(anew)
            return
        try:
            self.film.container.seek(target, stream=self.film.stream, any_frame=False)
            yield from decoded(self.film)
        except av.FFmpegError:
            return  # what is wrong shows from further ahead as well, or is not wrong there

    def _numbered(self, target: int | None, *, first: int) -> Iterator[tuple[int, Any]]:
        """Frames with their numbers, for as long as every one is the next one listed."""
        times = self.video.timestamps
        index = 0 if target is None else None
        for frame in self._frames(target):
            if index is None:
                if frame.pts is None or frame.pts > times[first]:
                    return
                place = bisect_left(times, frame.pts)
                if not frame.key_frame or times[place] != frame.pts:
                    continue  # shown before the keyframe, and decoded by what lies before it
                index = place
            if index >= len(times) or not (self.video.counted or frame.pts == times[index]):
                return
            yield index, frame
            index += 1

    def _check_passed(self, passed: int, index: int) -> None:
        cure = f"a keyframe every 50 frames: {reencode(self.video.path, options='-g 50')}"
        say_if_long(passed, self.video.path, f"to get at frame {index}; what spares it is {cure}")
        if passed > self.limits.max_lead_in_frames:
            raise ValueError(
                f"got {passed:,} frames to decode before frame {index}; expected at most "
                f"{self.limits.max_lead_in_frames:,}; write it anew with {cure}; or raise "
                "--max_lead_in_frames"
            )
