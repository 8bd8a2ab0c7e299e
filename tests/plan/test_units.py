"""Rates, times and counts as people write them."""

from __future__ import annotations

import pytest

from ds_lvx.plan.units import bytes_per_s, count, seconds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("25GB/s", 25e9),
        ("200mbit", 25e6),
        ("200Gb/s", 25e9),
        ("200 Gbps", 25e9),
        ("1.5GiB/s", 1.5 * 2**30),
        ("64kbit/s", 8e3),
        ("1e3B/s", 1e3),
    ],
)
def test_rates(text: str, expected: float) -> None:
    assert bytes_per_s(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text", ["25", "25e9", "25GB", "25G", "fast", "", "25m", "0GB/s", "-1GB/s"]
)
def test_a_rate_without_its_unit_is_an_error_that_says_so(text: str) -> None:
    with pytest.raises(ValueError, match=r"--across: got '.*expected"):
        bytes_per_s(text, what="--across")


def test_times() -> None:
    assert seconds("1ms") == pytest.approx(1e-3)
    assert seconds("20us") == pytest.approx(20e-6)
    assert seconds("0s") == 0
    for text in ("1", "1min", "ms"):
        with pytest.raises(ValueError, match="expected a time with its unit"):
            seconds(text)


def test_counts() -> None:
    assert [count(text) for text in ("384", "64K", "100M", "1.5K")] == [384, 65536, 10**8, 1536]
    for text in ("0", "1.5", "many", "-3", "5T"):
        with pytest.raises(ValueError, match="expected a whole number"):
            count(text)
