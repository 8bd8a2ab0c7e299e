"""Quantities as people write them: ``25GB/s``, ``200mbit``, ``1ms``, ``100M``.

What is none is a `ValueError` that names what it was given for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z/µ]*)\s*")
_RATE = re.compile(r"(?:([kmgt])(i?))?(bit|b|B)(/s|ps)?", re.IGNORECASE)
_POWERS = {None: 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_DURATIONS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
_SIZES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
_COUNTS = {"": 1, "k": 1024, "ki": 1024, "m": 10**6, "g": 10**9}


def bytes_per_s(text: str, *, what: str = "rate") -> float:
    """A rate in bytes a second: ``25GB/s`` (bytes), ``200mbit`` or ``200Gb/s`` (bits)."""
    rate = _quantity(
        text,
        _bytes_in,
        f"{what}: got {text!r}, which has no unit of a rate; expected bytes, such as 25GB/s, or "
        "bits, such as 200mbit or 200Gb/s",
    )
    if rate <= 0:
        raise ValueError(f"{what}: got {text!r}; expected more than 0")
    return rate


def seconds(text: str, *, what: str = "latency") -> float:
    """A time in seconds: ``1ms``, ``20us``."""
    expected = f"a time with its unit, one of {list(_SECONDS)}, such as 1ms or 20us"
    return _quantity(text, _SECONDS.get, f"{what}: got {text!r}; expected {expected}")


def count(text: str, *, what: str = "count") -> int:
    """A whole number of at least 1: ``64K`` is 65,536, as lengths are, ``100M`` 10^8."""
    error = f"{what}: got {text!r}; expected a whole number of at least 1, such as 384, 64K or 100M"
    value = _quantity(text, lambda unit: _COUNTS.get(unit.lower()), error)
    if value != int(value) or value < 1:
        raise ValueError(error)
    return int(value)


def at_least(least: int, **values: int) -> None:
    """Refuse what is less, by the name of its option."""
    for name, value in values.items():
        if value < least:
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: got {value}; expected at least {least}")


def duration(seconds: float) -> str:
    """For people: three digits and a unit."""
    return _rounded(seconds, _DURATIONS)


def size(nbytes: float) -> str:
    """For people: three digits and a unit."""
    return _rounded(nbytes, _SIZES)


def _rounded(value: float, units: Sequence[tuple[float, str]]) -> str:
    factor, unit = next((each for each in units if value >= each[0]), units[-1])
    return f"{value / factor:.3g} {unit}"


def _quantity(text: str, factor_of: Callable[[str], float | None], error: str) -> float:
    match = _NUMBER.fullmatch(text)
    factor = None if match is None else factor_of(match[2])
    if match is None or factor is None:
        raise ValueError(error)
    return float(match[1]) * factor


def _bytes_in(unit: str) -> float | None:
    """Bytes a second of a unit; None where it is not a rate's."""
    match = _RATE.fullmatch(unit)
    # "b" is a bit and "B" a byte; without "/s" or "ps" only "bit" is a rate, as in tc.
    if match is None or (match[3] in "bB" and match[4] is None):
        return None
    size = (1024 if match[2] else 1000) ** _POWERS[match[1] and match[1].lower()]
    return size if match[3] == "B" else size / 8
