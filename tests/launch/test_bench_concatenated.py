"""The benchmark against gathered embeddings: what it writes, and what is committed of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ds_lvx.compare.training import among
from launch import bench_concatenated
from tests.forked import fork_fresh_ranks

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = (f"<!-- bench_concatenated.py, concatenated: {edge} -->" for edge in ("begin", "end"))


@pytest.mark.slow
def test_a_quick_run_writes_json_tables_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "document.md"
    document.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    words = ("--quick", "--network", "none", "--ranks", "2")
    places = ("--output_dir", str(tmp_path), "--document", str(document))
    monkeypatch.setattr(sys, "argv", ["bench_concatenated.py", *words, *places])
    fork_fresh_ranks(monkeypatch)
    assert bench_concatenated.main() == 0
    results = json.loads((tmp_path / "concatenated.json").read_text())
    assert results["kind"] == "measured"
    assert among.text(results) in document.read_text()
    (steps,) = results["steps"].values()
    assert [record["method"] for record in steps["records"]] == [*among.METHODS]
    sent = {record["method"]: record["attention_bytes"] for record in steps["records"]}
    assert sent["gathered"] > sent["ulysses"]
    assert results["memory"]["frames"] == [2, 4]
    for record in results["memory"]["records"]:
        assert record["peak_bytes"][1] > record["peak_bytes"][0] > 0
    assert (tmp_path / "concatenated.png").read_bytes().startswith(b"\x89PNG")


def test_the_document_has_the_figures_of_the_committed_json() -> None:
    """And none where there is no JSON."""
    committed = ROOT / "docs" / "benchmarks" / "concatenated.json"
    text = (ROOT / "docs" / "concatenated.md").read_text()
    stands = text.partition(BEGIN)[2].partition(END)[0].strip()
    expected = among.text(json.loads(committed.read_text())) if committed.exists() else ""
    assert stands == expected


def test_what_cannot_be_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        (("--network", "fast"), "--network: got 'fast'"),
        (("--render",), "No such file"),
    ):
        monkeypatch.setattr(sys, "argv", ["bench", *words, "--output_dir", str(tmp_path)])
        assert bench_concatenated.main() == 1
        assert message in capsys.readouterr().err
