"""Options that several commands have, and types of options."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from ds_lvx.data.formats import FORMATS
from ds_lvx.data.limits import DEFAULT_LIMITS, Limits


def add_format(group: Any) -> None:
    """How the files of chats are written."""
    group.add_argument(
        "--format", choices=tuple(FORMATS), help="of their records (default: told by content)"
    )
    group.add_argument(
        "--media_root", help="folder that relative paths of media begin in (default: the data's)"
    )


def add_load_in_4bit(group: Any) -> None:
    """Whether weights are quantized as they are read."""
    group.add_argument(
        "--load_in_4bit",
        action="store_true",
        help="the weights that LoRA stands on in 4 bits (NF4), but for vision tower and head",
    )


def add_rate(group: Any) -> None:
    """How much of a sample is taken."""
    rate = group.add_mutually_exclusive_group()
    rate.add_argument("--fps", type=above(float, 0), help="frames a second of video (default: 1)")
    rate.add_argument("--frames", type=above(int, 0), help="frames a video, evenly spaced")
    group.add_argument(
        "--max_frames",
        type=above(int, 0),
        help="with --fps: frames of a video at most; of a longer one so many, evenly spaced",
    )
    group.add_argument(
        "--max_length",
        type=above(int, 1),
        help="text tokens a sample may have (default: the model's positions); more is an error",
    )


def add_limits(group: Any) -> None:
    """Bounds of what a line, an image or a film may cost."""
    default = DEFAULT_LIMITS
    group.add_argument(
        "--max_pixels",
        type=above(int, 0),
        default=default.max_pixels,
        help="of an image, or of a frame (default: %(default)s)",
    )
    group.add_argument(
        "--max_film_frames",
        type=above(int, 0),
        default=default.max_film_frames,
        help="of a video, chosen or not (default: %(default)s)",
    )
    group.add_argument(
        "--max_lead_in_frames",
        type=above(int, 0),
        default=default.max_lead_in_frames,
        help="decoded only to get at a chosen one (default: %(default)s)",
    )
    group.add_argument(
        "--max_gap_s",
        type=above(float, 0),
        default=default.max_gap_s,
        help="seconds between two frames (default: %(default)s)",
    )
    group.add_argument(
        "--max_line_bytes",
        type=above(int, 0),
        default=default.max_line_bytes,
        help="of a line of --data and --eval_data (default: %(default)s)",
    )


def limits_of(options: Any) -> Limits:
    """What the options of `add_limits` say."""
    return Limits(**{each.name: getattr(options, each.name) for each in fields(Limits)})


def above(kind: Callable[[str], Any], low: float) -> Callable[[str], Any]:
    """The type of an option that is a number above another."""
    return _checked(kind, lambda value: value > low, f"more than {low}")


def from_(kind: Callable[[str], Any], low: float) -> Callable[[str], Any]:
    """The type of an option that is such a number or above it."""
    return _checked(kind, lambda value: value >= low, f"{low} or more")


def _checked(
    kind: Callable[[str], Any], good: Callable[[Any], bool], expected: str
) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not math.isfinite(value) or not good(value):
            raise argparse.ArgumentTypeError(f"got {text!r}; expected a number, {expected}")
        return value

    return convert
