"""Figures in the README are those of the committed measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("case", ["q64-kv64K", "q256-kv32K"])
def test_the_readme_has_the_measured_seconds(case: str) -> None:
    path = ROOT / "docs" / "benchmarks" / f"compare-{case}-ranks4-200mbit.json"
    results = json.loads(path.read_text())
    assert results["kind"] == "emulated"
    seconds = {record["method"]: record["step_s"]["median"] for record in results["records"]}
    text = (ROOT / "README.md").read_text()
    for method in ("lvx-gather", "ulysses", "ring"):
        assert f" {seconds[method]:.3f} s" in text, method
