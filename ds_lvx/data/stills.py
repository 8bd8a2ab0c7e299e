"""Videos as lists of frames: their times, and what their headers say."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from fractions import Fraction

from ds_lvx.data.frames import Video
from ds_lvx.data.held import Stills
from ds_lvx.data.images import image_sides
from ds_lvx.data.limits import DEFAULT_LIMITS, Limits


def video_of(stills: Stills) -> Video:
    """The frames as those of a film, one after the other; no file is looked at."""
    times = array("q", range(len(stills.files)))
    return Video(str(stills), times, (0,), 1 / Fraction(str(stills.fps)), 0, 0)


def sides_of(
    stills: Stills, indices: Sequence[int] | None = None, *, limits: Limits = DEFAULT_LIMITS
) -> tuple[int, int]:
    """Height and width of the frames, by their headers.

    Args:
        stills: the video.
        indices: of these frames; None: of all.
        limits: for their size.

    Raises:
        ValueError: one cannot be read, or they are not of one size; the message names the file.
    """
    files = stills.files if indices is None else [stills.files[index] for index in indices]
    first = image_sides(files[0], limits=limits)
    for file in files[1:]:
        sides = image_sides(file, limits=limits)
        if sides != first:
            raise ValueError(
                f"{file}: got a frame of {sides[1]} x {sides[0]} pixels; expected {first[1]} x "
                f"{first[0]} as of {files[0]}, the first of its list; scale them alike, or give "
                "each as an image"
            )
    return first
