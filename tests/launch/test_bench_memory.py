"""The memory benchmark: what it writes, what it refuses, and what is committed of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import bench_memory
from bench import memory
from bench.memory import compared
from ds_lvx.compare.document import deliver, save
from tests.forked import fork_fresh_ranks

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENT = ROOT / "docs" / "memory.md"
EMPTY = "".join(
    f"<!-- bench_memory.py, {name}: begin -->\n<!-- bench_memory.py, {name}: end -->\n"
    for name in bench_memory.PARTS
)


@pytest.mark.exhaustive
def test_a_quick_run_writes_json_tables_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "document.md"
    document.write_text(f"before\n{EMPTY}after\n")
    words = ("--only", "lvx", "--features", "trained", "--steps", "2", "--budget_gib", "0.02")
    words += ("--quick", "--ranks", "1", "--frames", "4", "--rounds", "1")
    places = ("--output_dir", str(tmp_path), "--document", str(document))
    monkeypatch.setattr(sys, "argv", ["bench_memory.py", *words, *places])
    fork_fresh_ranks(monkeypatch)
    bench_memory.main()
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    for part in bench_memory.PARTS:
        results = json.loads((tmp_path / f"{part}.json").read_text())
        assert results["kind"] == "measured"
        assert results["command"].startswith("bench_memory.py ")
        assert memory.text(results) in text
        (record,) = results["records"]
        if part == "step_time":
            assert set(record["step_s"]) == {"kept", "recomputed"}
            assert f"{record['recomputation_costs']['step_s']:+.1%} |" in text
            continue
        assert record["timed"]["tokens"] == 260
        assert [run["tokens"] for run in record["runs"][:2]] in ([520, 780], [780, 1560])
        assert [len(run["ranks"]) for run in record["runs"]] == [1, 1, 1]
        assert len(record["step_s"]["samples"]) == 2
        assert record["peak_bytes_per_token"] > 0
        assert record["runs"][-1]["tokens"] >= 65
        assert record["ds_config"]["ds_lvx"]["sequence_parallel_size"] == 1
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_interrupted_leaves_the_results_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = ("--parts", "step_time", "--output_dir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["bench_memory.py", *places])
    before, unfinished = tmp_path / "step_time.json", tmp_path / "step_time.unfinished.json"
    before.write_text("whole\n")
    costs = {"recomputation_costs": {"step_s": 0.1, "processor_s": 0.1}, "vision_tower": "frozen"}
    found = iter([costs])

    def recomputation(*_: Any, **__: Any) -> dict[str, Any]:
        for record in found:
            return record
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "recomputation", recomputation)
    with pytest.raises(SystemExit):
        bench_memory.main()
    assert before.read_text() == "whole\n"
    assert json.loads(unfinished.read_text())["records"] == [costs]
    save({}, before)
    assert not unfinished.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "0"], "--ranks: got 0; expected at least 1"),
        (["--budget_gib", "-1"], "--budget_gib: got -1.0; expected 0 or more"),
        (["--only", "lvxx"], "--only: got 'lvxx'; expected some of: lvx; lvx, recompute;"),
        (["--render", "--output_dir", "/nowhere"], "got no memory.json in /nowhere"),
    ],
)
def test_bad_arguments(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_memory.py", *words])
    with pytest.raises(SystemExit):
        bench_memory.parse_options()
    assert message in capsys.readouterr().err


def test_a_document_without_a_place_for_the_table(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text("nothing\n")
    with pytest.raises(ValueError, match="memory: begin -->' followed by '<!-- bench"):
        deliver(memory, committed("memory"), program="bench_memory.py", document=document)
    assert document.read_text() == "nothing\n"


def committed(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "benchmarks" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", bench_memory.PARTS)
def test_the_document_has_the_figures_of_the_committed_json(name: str) -> None:
    results = committed(name)
    assert results["kind"] == "measured"
    assert memory.text(results) in DOCUMENT.read_text()


def test_committed_predictions_are_those_of_the_formulas_and_hold() -> None:
    results = committed("memory")
    for record in results["records"]:
        now = compared(record, ranks=results["ranks"], cuda=results["device"] == "cuda")
        assert record["predicted"] == now["predicted"]
        assert record["measured_over_predicted"] == pytest.approx(1.0, abs=0.05), record["name"]
        by_formula = now["predicted"]["kept_bytes_per_token"]
        assert record["kept_bytes_per_token"] == pytest.approx(by_formula, rel=0.05)


def test_the_document_names_the_bytes_of_the_formulas() -> None:
    text = DOCUMENT.read_text()
    records = {(r["name"], r["features"]): r for r in committed("memory")["records"]}
    settings = {
        "| lvx |": "lvx",
        "| `recompute_kv`, `kv_chunk_tokens` |": "lvx, recompute, checkpointing, chunks",
    }
    for begin, name in settings.items():
        trained, frozen = (
            records[name, features]["predicted"]["peak_bytes_per_token"]
            for features in ("trained", "frozen")
        )
        assert f"{begin} {trained:,.0f} | {frozen:,.0f} |" in text
