"""The benchmark of generation: what it writes, and what it leaves out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

import bench_generate
from bench import generation
from ds_lvx.compare.case import Case
from ds_lvx.compare.decoding import Job
from ds_lvx.plan.cluster import Cluster
from ds_lvx.plan.profile import FORMAT
from tests.forked import fork_fresh_ranks

ROOT = Path(__file__).resolve().parents[2]
MARKS = "<!-- bench_generate.py, generate: begin -->\n<!-- bench_generate.py, generate: end -->\n"


@pytest.mark.exhaustive
def test_a_quick_run_writes_json_table_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "document.md"
    document.write_text(MARKS)
    words = ("--quick", "--ranks", "1", "2", "--tokens", "512", "64K", "--new_tokens", "3")
    words += ("--budget_gib", "0.02", "--output_dir", str(tmp_path), "--document", str(document))
    monkeypatch.setattr(sys, "argv", ["bench_generate.py", *words])
    fork_fresh_ranks(monkeypatch)
    bench_generate.main()
    results = json.loads((tmp_path / "generate.json").read_text())
    assert results["kind"] == "measured"
    assert generation.text(results) in document.read_text()
    one, two = results["records"]
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert one["tokens"] == two["tokens"]
    for each in (one, two):  # of one answer, or of several
        assert len(each["token_s"]["samples"]) == 3 * len(each["prompt_samples_s"]) > 0
    check_predictions(results)
    # 8 frames of 65 tokens, two layers, two heads of K and V of 16 numbers in fp32; and 17 tokens
    # of text in two layers of the same heads.
    keys, text = 2 * 520 * 2 * 2 * 16 * 4, 2 * 17 * 2 * 2 * 16 * 4
    assert one["predicted"]["kept_bytes"] == keys + text
    assert two["predicted"]["kept_bytes"] == keys / 2 + text
    for each in (one, two):
        assert each["predicted"]["tokens_per_s"] > 0
        assert each["predicted_over_measured"]["tokens_per_s"] == pytest.approx(
            each["predicted"]["tokens_per_s"] / each["tokens_per_s"]
        )
    assert [each["ranks"] for each in results["messages"]] == [2]
    assert results["messages"][0]["exchange_per_collective"] > 0
    assert one["speed_to_one_process"] == 1.0
    assert [each["ranks"] for each in results["left_out"]] == [1, 2]
    assert "65,520 tokens on 1 rank: 0.1 GiB" in generation.text(results)
    assert (tmp_path / "generate.png").read_bytes().startswith(b"\x89PNG")


COMMITTED = sorted((ROOT / "docs" / "benchmarks").glob("generate*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_the_document_has_what_is_committed(path: Path) -> None:
    results = json.loads(path.read_text())
    assert path.stem == generation.name(results)
    assert generation.text(results) in (ROOT / "docs" / "generation.md").read_text()


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_what_is_committed_is_predicted_by_the_formulas_as_they_are(path: Path) -> None:
    results = json.loads(path.read_text())
    if results["profiles"][0]["format"] < FORMAT:
        pytest.skip("measured before the formulas asked for what they ask for now")
    check_predictions(results)


def check_predictions(results: dict[str, Any]) -> None:
    """They follow from the samples that stand in the JSON."""
    case = TypeAdapter(Case).validate_python(results["case"])
    profiles = {each["ranks"]: each for each in results["profiles"]}
    numbers = dict.fromkeys(profiles, 0)
    for each in results["records"]:  # of a number of ranks, by length
        profile, frames = profiles[each["ranks"]], each["visual_tokens"] // case.frame_tokens
        cluster = generation.around(profile, profile["known"], numbers[each["ranks"]])
        numbers[each["ranks"]] += 1
        assert_all_close(json.loads(json.dumps(cluster)), each["cluster"])
        job = Job(case, (frames,), results["new_tokens"], results["dtype"])
        predicted = generation.predict(job, frames, Cluster.of(each["cluster"]))
        for name in ("token_s", "prompt_s", "kept_bytes", "peak_bytes"):
            assert predicted[name] == pytest.approx(each["predicted"][name])


def assert_all_close(found: Any, expected: Any) -> None:
    """Numbers to nine digits: a fit has other last ones on every kind of processor."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, each in expected.items():
            assert_all_close(found[key], each)
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_all_close(one, other)
    else:
        number = isinstance(expected, float)
        assert found == (pytest.approx(expected, rel=1e-9) if number else expected)
