"""Which frames a film has: as its container lists them, or, where that is no use, by decoding it.

Times in a container belong to packets. In files of cameras and encoders a packet is a frame, and
its time is that at which the frame is shown; an MP4 tells all of them in its header. But there are
containers without times of display (AVI, elementary streams), times that are wrong or go back
(files joined by cat), packets that show nothing (VP8's alternative references) and frames that
cannot be decoded (recordings that begin between two keyframes). What a decoder gives is the truth.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

from ds_lvx.data.container import Film, decoded, opened, reencode
from ds_lvx.data.limits import Limits, say_if_long
from ds_lvx.data.mp4 import shown_later

_MP4 = "mov,mp4,m4a,3gp,3g2,mj2"
# Where a packet has a time of display of its own.
_TIMED = (_MP4, "matroska,webm", "mpegts", "flv", "nut", "mxf")
# Every frame is a keyframe: packets are shown as they come, whatever the container.
_INTRA_ONLY = (
    *("mjpeg", "prores", "dnxhd", "ffv1", "huffyuv", "ffvhuff", "utvideo", "rawvideo", "dvvideo"),
    *("jpeg2000", "cfhd", "magicyuv"),
)
# Packets of these may be decoded and never shown.
_HIDING = ("vp8",)
# Where the container's duration was written by who made the file, not guessed by FFmpeg.
_TELLS_DURATION = ("matroska,webm", "flv", "asf", "ivf", "mxf")
# Packets that are compared with what the header of an MP4 says of them.
_COMPARED = 16
# Frames that are decoded and compared with what packets say. Wrong orders show at once.
_DECODED = 16


@dataclass
class Listing:
    """Packets of a stream in the order of the file, those that hold pictures.

    Attributes:
        shown: presentation times of those that are to be shown.
        keyframes: presentation times at which decoding can begin.
        orderly: all have times, and decoding times never go back.
    """

    shown: array[int] = field(default_factory=lambda: array("q"))
    keyframes: list[int] = field(default_factory=list)
    orderly: bool = True
    _last_dts: int | None = None

    def add(self, pts: int | None, dts: int | None, *, key: bool, discard: bool) -> None:
        """Append a packet."""
        if pts is None:
            self.orderly = False
            return
        if dts is not None:
            self.orderly &= self._last_dts is None or dts >= self._last_dts
            self._last_dts = dts
        if key:
            self.keyframes.append(pts)
        if not discard:
            self.shown.append(pts)

    def times(self) -> array[int] | None:
        """The times of all frames in order of display; None where they tell nothing certain."""
        ordered = array("q", sorted(self.shown))
        if not self.orderly or not ordered or any(a == b for a, b in pairwise(ordered)):
            return None
        return ordered


def listed(path: str, limits: Limits) -> tuple[array[int], tuple[int, ...]] | None:
    """What the packets tell: the header of an MP4 is read, and of other files every packet.

    Returns:
        The times of all frames in order of display, and those at which decoding can begin, in
        units of the stream's time base; None where decoding has to tell.

    Raises:
        ValueError: the film has more packets than ``limits`` allow, or ends long before the
            duration that it tells.
    """
    with opened(path, limits) as film:
        listing = _from_header(film, path, limits) if film.container_name == _MP4 else None
    if listing is None:
        with opened(path, limits) as film:
            listing = _from_packets(film, limits)
    times = listing.times()
    with opened(path, limits) as film:
        if times is None or film.codec in _HIDING:
            return None
        timed = film.container_name in _TIMED
        if film.codec not in _INTRA_ONLY and not (timed and _begins_as(times, film)):
            return None
    return times, tuple(sorted(set(listing.keyframes)))


def _begins_as(times: array[int], film: Film) -> bool:
    """Whether the first frames that are decoded are those listed."""
    shown = [frame.pts for frame in islice(decoded(film), _DECODED)]
    return shown == list(times[:_DECODED])


def _from_header(film: Film, path: str, limits: Limits) -> Listing | None:
    entries = film.stream.index_entries
    _check_count(len(entries), limits)
    later = shown_later(path, film.stream.id, len(entries))
    if later is None:
        return None
    listing = Listing()
    shift = max(0, -min(later, default=0))
    rows = [
        (entry.timestamp + shift + by, entry.timestamp, entry.is_keyframe, entry.is_discard)
        for entry, by in zip(entries, later, strict=True)
    ]
    packets = ((p.pts, p.dts, p.is_keyframe, p.is_discard) for p in _packets(film))
    if list(islice(packets, _COMPARED)) != rows[:_COMPARED]:
        return None
    for pts, dts, key, discard in rows:
        listing.add(pts, dts, key=key, discard=discard)
    return listing


def _packets(film: Film) -> Iterator[Any]:
    return (packet for packet in film.container.demux(film.stream) if packet.size > 0)


def _from_packets(film: Film, limits: Limits) -> Listing:
    listing, count, end = Listing(), 0, 0.0
    for packet in film.container.demux():
        if packet.size == 0:
            continue
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != film.stream.index:
            continue
        count += 1
        _check_count(count, limits)
        listing.add(packet.pts, packet.dts, key=packet.is_keyframe, discard=packet.is_discard)
    _check_end(film, end)
    return listing


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.max_film_frames:
        raise ValueError(
            f"got more than {limits.max_film_frames:,} frames; expected at most so many; cut the "
            "film into pieces, or raise --max_film_frames"
        )


def _check_end(film: Film, end_s: float) -> None:
    told_us = film.container.duration
    if film.container_name not in _TELLS_DURATION or told_us is None:
        return
    told_s = ((film.container.start_time or 0) + told_us) / 1e6
    if end_s < 0.9 * told_s and told_s - end_s > 1:
        raise ValueError(
            f"got {end_s:.1f} s of a film that says it lasts {told_s:.1f} s: its end is missing; "
            "expected a whole file; copy or download it again"
        )


def counted(path: str, limits: Limits) -> array[int]:
    """The times of all frames, found by decoding the film from its beginning to its end.

    Returns:
        Times in order of display, made to increase where they are missing or go back.

    Raises:
        ValueError: more frames than ``limits`` allow to be decoded for that.
    """
    given: list[int | None] = []
    decoding: list[int | None] = []
    with opened(path, limits) as film:
        for frame in decoded(film):
            given.append(frame.pts)
            decoding.append(frame.dts)
            why = f"to count them; an MP4 lists them: {reencode(path)}"
            say_if_long(len(given), path, why)
            if len(given) > limits.max_lead_in_frames:
                raise ValueError(
                    f"got a film ({film.container_name}, {film.codec}) of which decoding alone "
                    f"tells the frames, and more than {limits.max_lead_in_frames:,}; expected a "
                    "container with a time for every frame; make one: "
                    f"{reencode(path)}; or raise --max_lead_in_frames"
                )
        # As FFmpeg's players do: times of display, unless those of decoding have fewer faults.
        return increasing(min(given, decoding, key=_faults), step=_step(film))


def _step(film: Film) -> int:
    """Units of time from one frame to the next, where nothing better is known."""
    rate = film.stream.average_rate or film.stream.guessed_rate
    return max(round(1 / (rate * film.stream.time_base)), 1) if rate else 1


def _faults(times: Sequence[int | None]) -> int:
    """How many times are missing, or no later than the one before."""
    faults, last = 0, None
    for time in times:
        if time is None or (last is not None and time <= last):
            faults += 1
        last = time if time is not None else last
    return faults


def increasing(times: Sequence[int | None], *, step: int) -> array[int]:
    """Times that begin anew go on from where the ones before ended; missing ones are filled in."""
    shown, shift = array("q"), 0
    for time in times:
        after = shown[-1] + step if shown else 0
        if time is None:
            shown.append(after)
            continue
        if shown and time + shift <= shown[-1]:
            shift = after - time
        shown.append(time + shift)
    return shown
