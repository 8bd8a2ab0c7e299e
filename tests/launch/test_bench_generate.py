"""The benchmark of generation: what it writes, and what it leaves out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ds_lvx.compare import generation
from launch import bench_generate
from tests.forked import fork_fresh_ranks

MARKS = "<!-- bench_generate.py, generate: begin -->\n<!-- bench_generate.py, generate: end -->\n"


@pytest.mark.slow
def test_a_quick_run_writes_json_table_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "document.md"
    document.write_text(MARKS)
    words = ("--quick", "--ranks", "1", "2", "--tokens", "512", "64K", "--new_tokens", "3")
    words += ("--budget_gib", "0.01", "--output_dir", str(tmp_path), "--document", str(document))
    monkeypatch.setattr(sys, "argv", ["bench_generate.py", *words])
    fork_fresh_ranks(monkeypatch)
    bench_generate.main()
    results = json.loads((tmp_path / "generate.json").read_text())
    assert results["kind"] == "measured"
    assert generation.text(results) in document.read_text()
    one, two = results["records"]
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert one["tokens"] == two["tokens"]
    assert len(one["token_s"]["samples"]) == 3
    # 8 frames of 65 tokens, two layers, two heads of K and V of 16 numbers in fp32.
    assert (
        one["predicted_kept_bytes"] == 2 * 520 * 2 * 2 * 16 * 4 == 2 * two["predicted_kept_bytes"]
    )
    assert "exchange_s" not in one
    assert two["exchange_per_collective"] > 0
    assert one["speed_to_one_process"] == 1.0
    assert [each["ranks"] for each in results["left_out"]] == [1, 2]
    assert "65,520 tokens on 1 ranks: 0.1 GiB" in generation.text(results)
    assert (tmp_path / "generate.png").read_bytes().startswith(b"\x89PNG")
