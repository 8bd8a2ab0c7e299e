"""Media in columns of their own, and parts of videos, under the names that data sets have for them.

A column ``image``, ``images``, ``video`` or ``videos`` holds a path, bytes, an object with a path
and more, or a list of such; a list in that list is a video by its frames.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ds_lvx.data.conversation import Medium
from ds_lvx.data.errors import DataError, Source, shown
from ds_lvx.data.held import Held, of_data_url

KINDS = ("image", "video")
_START = ("video_start", "start", "start_time", "start_sec")
_END = ("video_end", "end", "end_time", "end_sec")
_BOTH = ("segment", "timestamp", "timestamps")
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)")
_PATHS = ("path", "file", "url")
_RATES = ("fps", "nframes", "sample_fps")
_SIZES = ("min_pixels", "max_pixels")


def columns(record: Mapping[str, Any], kinds: Sequence[str] = KINDS) -> dict[str, str]:
    """The columns of a record that hold media, by kind.

    Args:
        record: of the file.
        kinds: of these.
    """
    found = {}
    for kind in kinds:
        for name in (kind, f"{kind}s"):
            if record.get(name) not in (None, "", []):
                found[name] = kind
    return found


def words(record: Mapping[str, Any], *, plural: bool) -> dict[str, str]:
    """What the file calls the columns of media: those that a record has, or would have.

    Args:
        record: of the file.
        plural: how the format calls them.
    """
    usual = {kind: f"{kind}s" if plural else kind for kind in KINDS}
    return usual | {kind: name for name, kind in columns(record).items()}


def listed(
    record: Mapping[str, Any], source: Source, names: Mapping[str, str] | None = None
) -> dict[str, list[Medium]]:
    """The images and videos of a record, as our own form has them beside the messages.

    Times beside its one video are that video's.

    Args:
        record: of the file.
        source: where it stands.
        names: what the file calls ``images`` and ``videos``, where a description of it says so.

    Raises:
        DataError: a column holds something else, two columns hold the same kind, or times stand
            beside several videos or none.
    """
    lists: dict[str, list[Medium]] = {}
    for name, kind in columns(record).items():
        if f"{kind}s" in lists:
            raise DataError.at(
                source,
                got=f"the columns {kind!r} and '{kind}s'",
                expected="one of them",
                do="take the other out",
            )
        called = name if names is None else names[name]
        places = {called: record[name]}
        if isinstance(record[name], list):
            places = {f"{called}[{n}]": value for n, value in enumerate(record[name])}
        lists[f"{kind}s"] = [
            _medium(value, kind, where=where, source=source) for where, value in places.items()
        ]
    videos = lists.get("videos", [])
    alone = [key for key in (_START[0], _END[0]) if not videos and record.get(key) not in (None, 0)]
    if alone:  # another name may be of something else
        raise DataError.at(
            source,
            got=f"{' and '.join(alone)} without a video",
            expected="the times of a video",
            do="name the video, or take them out",
        )
    times = _times(record, source, "the record") if videos else {}
    if times:
        if len(videos) > 1 or videos[0].more:
            raise DataError.at(
                source,
                got=f"{', '.join(times)} beside {len(videos)} videos",
                expected="one video without times of its own",
                do='write them beside each path: {"path": "...", "video_start": 1.5, ...}',
            )
        lists["videos"] = [replace(videos[0], more=times)]
    return lists


def _medium(value: Any, kind: str, *, where: str, source: Source) -> Medium:
    more: dict[str, Any] = {}
    if isinstance(value, dict):
        names = (*_PATHS, kind)
        said = _SIZES if kind == "image" else (*_RATES, *_SIZES)
        more = {k: v for k, v in value.items() if k in said and v is not None}
        times = _times(value, source, where)
        known = {*names, *more, *_START, *_END, *_BOTH}
        paths = [value[key] for key in names if value.get(key) is not None]
        others = [key for key, v in value.items() if key not in known and v is not None]
        more |= times
        if len(paths) != 1 or others or (times and kind == "image"):
            raise _wrong(value, kind, where=where, source=source)
        value = paths[0]
    if kind == "video" and isinstance(value, list):
        places = {f"{where}[{n}]": file for n, file in enumerate(value)}
        return Medium(
            [_file(f, "image", where=w, source=source) for w, f in places.items()], more, where
        )
    return Medium(_file(value, kind, where=where, source=source), more, where)


def _file(value: Any, kind: str, *, where: str, source: Source) -> str | Held:
    """A path, or the bytes that stand in its place."""
    if isinstance(value, str) and value.startswith("data:"):
        try:
            value = of_data_url(value)
        except ValueError as error:
            raise DataError.at(
                source,
                got=f"a data: URL in {where}: {error}",
                expected="data:image/png;base64,...",
                do="write the data again, or name a file",
            ) from None
    if not isinstance(value, str | Held):
        raise _wrong(value, kind, where=where, source=source)
    return value


def _wrong(value: Any, kind: str, *, where: str, source: Source) -> DataError:
    example = '"a.mp4", ["1.jpg", "2.jpg"] or {"path": "a.mp4", "video_start": 1.5, "video_end": 4}'
    return DataError.at(
        source,
        got=f"{shown(value)} for {where}",
        expected='"a.png"' if kind == "image" else example,
        do="correct the entry",
    )


def _times(item: Mapping[str, Any], source: Source, where: str) -> dict[str, float]:
    """``video_start`` and ``video_end`` of an object, under whichever name it has them."""
    given = {key: item[key] for key in (*_START, *_END) if item.get(key) is not None}
    for key in _BOTH:
        pair = item.get(key)
        if isinstance(pair, list) and len(pair) == 2:
            given |= {f"{key}[0]": pair[0], f"{key}[1]": pair[1]}
    times: dict[str, float] = {}
    for key, value in given.items():
        ends = key in _END or key.endswith("[1]")
        name, second = "video_end" if ends else "video_start", _seconds(value)
        if second is None or name in times:
            raise DataError.at(
                source,
                got=f"{key} {shown(value)} in {where}"
                + ("" if second is None else f" beside another {name}"),
                expected="seconds, or hours:minutes:seconds, once",
                do="correct it",
            )
        times[name] = second
    return times


def _seconds(value: Any) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    clock = _CLOCK.fullmatch(value) if isinstance(value, str) else None
    if clock is None:
        return None
    hours, minutes, seconds = clock.groups()
    return 3600 * int(hours or 0) + 60 * int(minutes) + float(seconds)
