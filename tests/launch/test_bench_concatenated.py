"""The benchmark against gathered embeddings: what it writes, and what is committed of it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import bench_concatenated
from ds_lvx.compare.harness import spread
from ds_lvx.compare.training.breakdown import COLUMNS, PHASES
from tests.forked import fork_fresh_ranks

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = (f"<!-- bench_concatenated.py, concatenated: {edge} -->" for edge in ("begin", "end"))


@pytest.mark.exhaustive
def test_a_quick_run_writes_json_tables_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "document.md"
    document.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    words = ("--quick", "--network", "none", "--ranks", "2")
    places = ("--output_dir", str(tmp_path), "--document", str(document))
    monkeypatch.setattr(sys, "argv", ["bench_concatenated.py", *words, *places])
    fork_fresh_ranks(monkeypatch)
    bench_concatenated.main()
    results = json.loads((tmp_path / "concatenated.json").read_text())
    assert results["kind"] == "measured"
    assert bench_concatenated.text(results) in document.read_text()
    (steps,) = results["steps"].values()
    assert [record["method"] for record in steps["records"]] == [*bench_concatenated.METHODS]
    sent = {record["method"]: record["attention_bytes"] for record in steps["records"]}
    assert sent["gathered"] > sent["ulysses"]
    assert results["memory"]["frames"] == [2, 4]
    for record in results["memory"]["records"]:
        assert min(record["peak_bytes"]) > 0  # so small that their order is chance
    assert (tmp_path / "concatenated.png").read_bytes().startswith(b"\x89PNG")


def made_up() -> dict[str, Any]:
    """Results as `measure` has them."""
    phases = {phase: dict.fromkeys(COLUMNS, 0.5) for phase in PHASES}
    case = asdict(bench_concatenated.case_of(256, 4, 2, 2))
    steps = [
        {
            "method": method,
            "sizes": {"visual_tokens": 2048, "text_tokens": 256},
            "step_s": spread([2.0 + n]),
            "attention_bytes": 3_000_000,
            "typical": {"parts_s": phases},
            "answers": [{"interface_bytes": [4_000_000, 6_000_000]}],
        }
        for n, method in enumerate(bench_concatenated.METHODS)
    ]
    job = {"case": case, "frames": 8, "dtype": "float32"}
    plan = {"ranks": 4, "network": "200mbit"}
    weighed = [{"method": m, "peak_bytes": [2**20, 2**21]} for m in bench_concatenated.WEIGHED]
    memory = {"case": case, "frames": [4, 8], "tokens_of_a_frame": 256, "ranks": 4}
    return {
        "hardware": {"device": "a processor"},
        "steps": {"tiny": {"job": job, "plan": plan, "records": steps}},
        "memory": {**memory, "records": weighed},
    }


def test_tables_and_plot(tmp_path: Path) -> None:
    text = bench_concatenated.text(made_up())
    row = "| gathered, then Ulysses | 2.000 (2.000 to 2.000) | 1.00 | 6.000 | 3.00 | 5.0 |"
    assert row in text
    assert "| at home, lvx | 4.000 (4.000 to 4.000) | 0.50 |" in text
    assert "| embeddings | 4 frames (1,024 tokens) | 8 frames (2,048 tokens) |" in text
    assert "| at home, Ulysses | 1 | 2 |" in text
    bench_concatenated.draw(made_up()).savefig(tmp_path / "plot.png")


def test_the_document_has_the_figures_of_the_committed_json() -> None:
    """And none where there is no JSON."""
    committed = ROOT / "docs" / "benchmarks" / "concatenated.json"
    text = (ROOT / "docs" / "concatenated.md").read_text()
    stands = text.partition(BEGIN)[2].partition(END)[0].strip()
    expected = (
        bench_concatenated.text(json.loads(committed.read_text())) if committed.exists() else ""
    )
    assert stands == expected


def test_what_cannot_be_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, message in (
        (("--network", "fast"), "bench_concatenated: --network: got 'fast'"),
        (("--render",), "bench_concatenated: .*No such file"),
    ):
        monkeypatch.setattr(sys, "argv", ["bench", *words, "--output_dir", str(tmp_path)])
        with pytest.raises(SystemExit, match=message):
            bench_concatenated.main()
