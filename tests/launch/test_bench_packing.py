"""The benchmark of packing: what it writes, and that every way trains the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import bench_generate
import bench_packing
from tests.forked import fork_fresh_ranks

MARKS = "<!-- bench_packing.py, packing: begin -->\n<!-- bench_packing.py, packing: end -->\n"


@pytest.mark.exhaustive
def test_a_quick_run_writes_json_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "document.md"
    document.write_text(MARKS)
    words = ("--quick", "--output_dir", str(tmp_path), "--document", str(document))
    monkeypatch.setattr(sys, "argv", ["bench_packing.py", *words])
    fork_fresh_ranks(monkeypatch)
    bench_packing.main()
    results = json.loads((tmp_path / "packing.json").read_text())
    assert results["kind"] == "measured"
    assert bench_packing.text(results) in document.read_text()
    alone, padded, grouped, packed = results["records"]
    for other in (alone, packed):
        assert other["losses"] == pytest.approx(padded["losses"], abs=1e-4)
    # What is there, and nothing more.
    assert packed["text_tokens"] == alone["text_tokens"] < padded["text_tokens"]
    assert packed["frames"] == alone["frames"] == sum(frames for _, frames in results["sizes"])
    assert padded["to_padded"] == 1
    assert grouped["text_tokens"] <= padded["text_tokens"]


def test_the_document_has_the_table_of_the_committed_json() -> None:
    """And nothing where there is no JSON."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    begin, end = MARKS.splitlines()
    text = (docs / "fine-tuning.md").read_text()
    stands = text.partition(begin)[2].partition(end)[0].strip()
    committed = docs / "benchmarks" / "packing.json"
    expected = bench_packing.text(json.loads(committed.read_text())) if committed.exists() else ""
    assert stands == expected


def test_no_json_to_render_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for program in (bench_packing, bench_generate):
        words = [program.__name__, "--render", "--output_dir", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit, match=r"bench_\w+: .*No such file.*\.json"):
            program.main()
