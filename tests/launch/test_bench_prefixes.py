"""The benchmark of shared prefixes: what it writes, and that both ways train the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import bench_prefixes
from tests.forked import fork_fresh_ranks

MARKS = "<!-- bench_prefixes.py, prefixes: begin -->\n<!-- bench_prefixes.py, prefixes: end -->\n"


@pytest.mark.exhaustive
def test_a_quick_run_writes_json_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "document.md"
    document.write_text(MARKS)
    words = ("--quick", "--output_dir", str(tmp_path), "--document", str(document))
    monkeypatch.setattr(sys, "argv", ["bench_prefixes.py", *words])
    fork_fresh_ranks(monkeypatch)
    bench_prefixes.main()
    results = json.loads((tmp_path / "prefixes.json").read_text())
    assert results["kind"] == "measured"
    assert bench_prefixes.text(results) in document.read_text()
    among, beside = results["models"]
    for model in (among, beside):
        one, apart, shared = model["records"]
        prompt, said = model["prompt_tokens"], model["said"]
        assert sum(one["tokens"]) == prompt + said
        assert sum(apart["tokens"]) == 2 * (prompt + said)
        # The last of the prompt is each one's.
        assert sum(shared["tokens"]) == prompt + 2 * said + 1
        assert shared["losses"] == pytest.approx(apart["losses"], rel=1e-5)
    assert (among["prompt_tokens"], beside["prompt_tokens"]) == (545, 32)


def test_the_document_has_the_table_of_the_committed_json() -> None:
    """And nothing where there is no JSON."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    begin, end = MARKS.splitlines()
    text = (docs / "shared-prefixes.md").read_text()
    stands = text.partition(begin)[2].partition(end)[0].strip()
    committed = docs / "benchmarks" / "prefixes.json"
    expected = bench_prefixes.text(json.loads(committed.read_text())) if committed.exists() else ""
    assert stands == expected
