"""The planner's validation: what it makes of measured runs, without measuring any."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import bench_plan as bench
from ds_lvx.plan import fit
from ds_lvx.plan.cards import CARDS
from ds_lvx.plan.cluster import from_card

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "bench_plan.py"


def piece(**step_s: float) -> dict[str, Any]:
    run = {"seqlen_q": 64, "seqlen_kv": 8192, "heads": 8, "kv_heads": 8, "head_dim": 64}
    cluster = from_card(CARDS["A30"], gpus=2).record()
    medians = {name.replace("_", "-"): {"median": seconds} for name, seconds in step_s.items()}
    runs = [{**run, "step_s": medians}]
    return {"network": "1gbit", "ranks": 2, "profile": {"cluster": cluster}, "runs": runs}


def test_errors_are_those_of_the_prediction() -> None:
    one = piece(lvx_gather=1.0, ring=1.0, none=1.0)
    exact = {name: bench.predict(one, one["runs"][0], name) for name in ("lvx-gather", "ring")}
    # A tenth longer, half as long, and right.
    measured = {"lvx_gather": exact["lvx-gather"] / 0.9, "ring": exact["ring"] / 2}
    measured["none"] = bench.predict(one, one["runs"][0], "none")
    found = bench.errors([piece(**measured)])
    assert found["count"] == 3
    assert found["by_method"]["lvx-gather"]["worst"] == pytest.approx(0.1)
    assert found["worst"] == pytest.approx(1.0)
    assert found["median"] == pytest.approx(0.1)
    assert exact["ring"] != exact["lvx-gather"]


def test_tables_have_every_case_and_every_method() -> None:
    pieces = [piece(lvx_gather=0.25, ring=0.5)]
    results = {"errors": bench.errors(pieces), "hardware": {"device": "some CPU"}}
    text = bench.network_table(results)
    assert "| 1gbit | 2 | 64 | 8192 | 250 / " in text
    assert "worst error" in text
    assert bench.draw(results).axes


@pytest.mark.exhaustive
def test_the_papers_table_is_written_into_a_document(tmp_path: Path) -> None:
    document = tmp_path / "planning.md"
    edges = [f"<!-- bench_plan.py, published: {edge} -->" for edge in ("begin", "end")]
    document.write_text(f"before\n{edges[0]}\nold\n{edges[1]}\nafter\n")
    words = ["--parts", "published", "--output_dir", str(tmp_path), "--document", str(document)]
    subprocess.run([sys.executable, str(SCRIPT), *words], check=True, capture_output=True)
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    record = json.loads((tmp_path / "plan_published.json").read_text())
    assert record["kind"] == "predicted"
    for row in record["records"]["both ways"]:
        assert 1 / 1.5 < row["predicted_over_published"] < 1.5
        assert f"| {row['speedup']:.1f} | {row['predicted_speedup']:.1f} |" in text


@pytest.mark.parametrize("part", bench.PARTS)
def test_the_document_has_what_is_committed(part: str) -> None:
    results = json.loads((ROOT / "docs" / "benchmarks" / f"plan_{part}.json").read_text())
    assert bench.table(part, results) in (ROOT / "docs" / "planning.md").read_text()


def test_what_is_committed_is_right_enough() -> None:
    results = json.loads((ROOT / "docs" / "benchmarks" / "plan_network.json").read_text())
    assert results["kind"] == "emulated"
    today, then = bench.comparisons(results["pieces"]), results["errors"]["comparisons"]
    predicted, written = ([each["predicted_s"] for each in record] for record in (today, then))
    assert predicted == pytest.approx(written, rel=1e-3)  # the formulas have not changed since
    assert len(predicted) == 90
    assert results["errors"]["median"] < 0.15
    assert results["errors"]["worst"] < 0.40
    taken = [each["measured_over_best"] for each in results["errors"]["auto"]]
    assert sum(ratio > 1.10 for ratio in taken) <= 2  # of 18: predicted within 10% of the best
    assert max(taken) < 1.2


def test_the_committed_profiles_are_what_calibration_makes_of_their_samples() -> None:
    results = json.loads((ROOT / "docs" / "benchmarks" / "plan_network.json").read_text())
    for one in results["pieces"]:
        link = json.loads(json.dumps(asdict(fit.link(one["profile"]["answers"]))))
        # Samples are written to four digits, what is made of them is not.
        assert list(numbers(one["profile"]["cluster"]["within"])) == pytest.approx(
            list(numbers(link)), rel=2e-3, abs=1e-6
        )


def numbers(record: Any) -> Iterator[float]:
    """Those of a JSON record, in its order."""
    if isinstance(record, dict | list):
        for each in record.values() if isinstance(record, dict) else record:
            yield from numbers(each)
    else:
        yield record
