"""Words for error messages about a ds_config: where, what it holds, what was probably meant."""

import json
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


def key_path(loc: tuple[str | int, ...]) -> str:
    """Write a location as `layers[1].method`."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc)
    return "".join(steps).removeprefix(".")


def shown(value: Any) -> str:
    """Write a value as JSON has it, shortened to what a reader needs to recognise it."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def closest(word: str, known: Iterable[str], *, count: int = 3, cutoff: float = 0.0) -> list[str]:
    """Return up to `count` of `known`, those most like `word` first; capitals do not matter."""
    by_lower = {name.lower(): name for name in known}
    return [by_lower[low] for low in get_close_matches(word.lower(), by_lower, count, cutoff)]


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """Return what `word` was probably meant to be, or None if nothing is like it."""
    return next(iter(closest(word, known, count=1, cutoff=cutoff)), None)


def in_ranks(count: int) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{count} rank{'' if count == 1 else 's'}"
