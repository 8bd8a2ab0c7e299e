"""Quantities as people write them: ``25GB/s``, ``200mbit``, ``1ms``, ``100M``."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z/µ]*)\s*")
_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_RATE = re.compile(r"([kmgt]i?)?(bit|b|B)(/s|ps)?", re.IGNORECASE)


def bytes_per_s(text: str, *, what: str = "rate") -> float:
    """A rate in bytes a second: ``25GB/s`` (bytes), ``200mbit`` or ``200Gb/s`` (bits).

    Raises:
        ValueError: no number, or no unit.
    """
    number, unit = _split(text, what, "a rate with its unit, such as 25GB/s or 200mbit")
    match = _RATE.fullmatch(unit)
    # "b" is a bit and "B" a byte; without "/s" or "ps" only "bit" is a rate, as in tc.
    if match is None or (match[2] in "bB" and match[3] is None):
        raise ValueError(
            f"{what}: got {text!r}, which has no unit of a rate; expected bytes, such as 25GB/s, "
            "or bits, such as 200mbit or 200Gb/s"
        )
    prefix = (match[1] or "").lower()
    factor = _BINARY.get(prefix) or _PREFIXES[prefix]
    return _positive(number * factor / (1 if match[2] == "B" else 8), text, what)


def seconds(text: str, *, what: str = "latency") -> float:
    """A time in seconds: ``1ms``, ``20us``.

    Raises:
        ValueError: no number, or no unit.
    """
    number, unit = _split(text, what, "a time with its unit, such as 1ms or 20us")
    if unit not in _SECONDS:
        raise ValueError(
            f"{what}: got {text!r}; expected a time with its unit, one of {list(_SECONDS)}, such "
            "as 1ms or 20us"
        )
    return number * _SECONDS[unit]


def count(text: str, *, what: str = "count") -> int:
    """A whole number, perhaps with K, M or G: ``64K`` is 65,536, as lengths are, ``100M`` 10^8.

    K is 1,024 and Ki too; M and G are powers of ten.

    Raises:
        ValueError: not such a number, or less than 1.
    """
    number, unit = _split(text, what, "a whole number, such as 384, 64K or 100M")
    factors = {"": 1, "k": 1024, "ki": 1024, "m": 10**6, "g": 10**9}
    if unit.lower() not in factors:
        raise ValueError(f"{what}: got {text!r}; expected a whole number, such as 384, 64K or 100M")
    value = number * factors[unit.lower()]
    if value != int(value) or value < 1:
        raise ValueError(f"{what}: got {text!r}; expected a whole number of at least 1")
    return int(value)


def _split(text: str, what: str, expected: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(f"{what}: got {text!r}; expected {expected}")
    return float(match[1]), match[2]


def _positive(value: float, text: str, what: str) -> float:
    if value <= 0:
        raise ValueError(f"{what}: got {text!r}; expected more than 0")
    return value
