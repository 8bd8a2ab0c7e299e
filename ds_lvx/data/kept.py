"""What `probe` found, kept on disk: films of which every byte was read are read once a machine."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import asdict
from fractions import Fraction
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from ds_lvx import cache
from ds_lvx.data.frames import Video, probe
from ds_lvx.data.limits import Limits

# Smaller files are looked at faster than a cache is worth.
SMALL_BYTES = 1 << 21
_FORMAT = 1


def kept_probe(path: str, *, limits: Limits) -> Video:
    """`probe`, or what it found when this file was probed before.

    The ranks of a machine wait for the first of them. The cache is in `ds_lvx.cache.folder`, a file
    of a few hundred bytes a film; a file of another size or time of change is another film.

    Raises:
        ValueError: as `probe` does; that is not kept.
    """
    try:
        state = Path(path).stat()
    except OSError:
        return probe(path, limits=limits)  # which says what is wrong
    if state.st_size < SMALL_BYTES:
        return probe(path, limits=limits)
    import av

    place = str(Path(path).resolve())
    what = (place, state.st_size, state.st_mtime_ns, asdict(limits), av.__version__, _FORMAT)
    name = f"films/{hashlib.sha256(repr(what).encode()).hexdigest()[:32]}.json"
    found = _video(path, cache.read(name))
    if found is None:  # only now the lock, behind which others may have written it
        record = cache.update(name, lambda old: _renewed(old, path, limits))
        found = _video(path, record)
    return probe(path, limits=limits) if found is None else found


def _renewed(record: dict[str, Any], path: str, limits: Limits) -> dict[str, Any]:
    return _record(probe(path, limits=limits)) if _video(path, record) is None else record


def _record(video: Video) -> dict[str, Any]:
    steps = [after - before for before, after in pairwise(video.timestamps)]
    return {
        "path": video.path,  # for who looks into the folder
        "first": video.timestamps[0],
        "steps": [[step, len(list(same))] for step, same in groupby(steps)],
        "keyframes": list(video.keyframes),
        "time_base": str(video.time_base),
        "size": [video.width, video.height],
        "aspect": str(video.aspect),
        "counted": video.counted,
    }


def _video(path: str, record: dict[str, Any]) -> Video | None:
    """The film of a record; None of an empty or a damaged one."""
    try:
        return _read(path, record)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _read(path: str, record: dict[str, Any]) -> Video:
    times = array("q", [record["first"]])
    for step, count in record["steps"]:
        for _ in range(count):
            times.append(times[-1] + step)
    width, height = record["size"]
    return Video(
        path,
        times,
        tuple(record["keyframes"]),
        Fraction(record["time_base"]),
        width,
        height,
        Fraction(record["aspect"]),
        record["counted"],
    )
