"""How much is launched for a layer: the committed count is today's, and within its bounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bench_launches

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "launches.json"


@pytest.mark.parametrize("way", bench_launches.WAYS)
def test_the_count_is_the_committed_one(way: str) -> None:
    record = json.loads(DOCUMENT.read_text())
    assert record["kind"] == "predicted"
    assert bench_launches.count(way) == record["launches"][way]


def test_gather_launches_few() -> None:
    """Attention's own launch among them; encoding and joining are one each."""
    passes = json.loads(DOCUMENT.read_text())["launches"]["lvx gather"]
    assert passes["forward"]["total"] <= 16
    assert passes["backward"]["total"] <= 24
    for each in passes.values():
        assert each["operations"]["encode_kernel"] == each["operations"]["join_kernel"] == 1
