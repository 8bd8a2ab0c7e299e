"""Whole steps side by side: the same losses and gradients, times that add up, and what is said."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_lvx.compare.case import TINY, build_model, cut, make_batch
from ds_lvx.compare.document import deliver
from ds_lvx.compare.harness import Ranks
from ds_lvx.compare.machine import header
from ds_lvx.compare.training import model
from ds_lvx.compare.training.breakdown import COLUMNS, PHASES
from ds_lvx.compare.training.model import disagreements, skipped
from ds_lvx.compare.training.rank import Task, finetune
from tests.ranks import run_ranks

CASE = replace(TINY, hidden=64, mlp=64, text_tokens=24, image_size=28)
TASK = Task("tiny", CASE, frames=6)
PARTS_MISS = 0.05


def measured(task: Task) -> dict[str, Any]:
    """On a rank."""
    return finetune(task)


ALONE, GATHERED = (1, TASK), (2, replace(TASK, method="lvx-gather"))
ULYSSES = replace(TASK, method="ulysses", checkpointing=True, text_method="ring")
FEW = [ALONE, GATHERED, (2, replace(ULYSSES, zero_stage=3, overlap=False))]
RING = replace(TASK, method="lvx-ring", zero_stage=3, overlap=False)
FURTHER = [ALONE, GATHERED, (2, RING), (2, ULYSSES)]


@pytest.fixture(
    scope="module", params=[FEW, pytest.param(FURTHER, marks=pytest.mark.exhaustive)], ids=len
)
def records(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Two ranks against one process, at two ZeRO stages, with and without overlap."""
    return [
        model.record(task.method, run_ranks(measured, ranks, replace(task, warmup=0, repeats=2)))
        for ranks, task in request.param
    ]


@pytest.mark.slow
def test_methods_agree_on_losses_and_every_gradient(records: list[dict[str, Any]]) -> None:
    assert disagreements(records, dtype="float32") == []
    for record in records:
        norms = record["gradient_norms"]
        assert sum(".cross_attn." in name for name in norms) == 2 * 6
        assert all(norm > 0 for name, norm in norms.items() if "k_proj" in name)
        # It trains: the optimizer's steps are part of what is compared.
        assert record["losses"][-1] < record["losses"][0]


@pytest.mark.slow
def test_parts_add_up_to_the_step_and_each_is_there(records: list[dict[str, Any]]) -> None:
    for record in records:
        for answer in record["answers"]:
            for step in answer["broken_down"]:
                # The first mark comes before the step's own clock, the last one behind it.
                assert _parts(step) >= 0.999 * step["whole_s"], (record["method"], step)
        for phase, columns in record["typical"]["parts_s"].items():
            computed = {name for name, seconds in columns.items() if seconds > 0}
            if phase != "optimizer":
                assert computed >= {"vision", "text", "cross_attention", "rest"}
            assert min(columns.values()) > -1e-9
            waits = "exposed_cross_attention" in computed
            assert waits == (record["ranks"] > 1 and phase != "optimizer"), (record, phase)


def _parts(step: dict[str, Any]) -> float:
    return sum(sum(columns.values()) for columns in step["parts_s"].values())


@pytest.mark.slow
def test_only_overlap_hides_and_only_queries_travel(records: list[dict[str, Any]]) -> None:
    by_name = {record["method"]: record for record in records}
    hidden = {name: sum(r["typical"]["hidden_s"].values()) for name, r in by_name.items()}
    assert hidden["none"] == 0
    assert hidden["lvx-gather"] > 0
    sent = {name: record["attention_bytes"] for name, record in by_name.items()}
    assert sent["none"] == 0
    assert 0 < sent["lvx-gather"] < sent["ulysses"]


def test_a_method_s_record_is_of_the_slowest_rank_and_the_median_step() -> None:
    def sample(seconds: float) -> dict[str, Any]:
        parts = {phase: dict.fromkeys(COLUMNS, 0.0) for phase in PHASES}
        parts["forward"]["text"] = seconds * 1.01
        return {"whole_s": seconds, "parts_s": parts, "hidden_s": dict.fromkeys(PHASES, 0.0)}

    def answer(steps: list[float], sent: int) -> dict[str, Any]:
        return {
            "losses": [1.0],
            "gradient_norms": {},
            "step_s": steps,
            "attention_bytes": [sent] * 3,
            "broken_down": [sample(seconds) for seconds in steps],
        }

    found = model.record("ring", [answer([3.0, 1.0, 1.0], 5), answer([1.0, 2.0, 7.0], 6)])
    assert found["step_s"]["samples"] == [3.0, 2.0, 7.0]
    assert found["typical"]["whole_s"] == 3.0
    assert found["sum_of_parts_over_whole"] == pytest.approx([1.01, 1.01])
    assert found["attention_bytes"] == 6


def test_what_differs_is_named() -> None:
    def record(method: str, loss: float, norm: float) -> dict[str, Any]:
        norms = {"a": 1.0, "b": norm}
        ranks = 1 if method == "none" else 2
        return {"method": method, "ranks": ranks, "losses": [2.0, loss], "gradient_norms": norms}

    one = record("none", 1.5, 0.5)
    assert disagreements([record("ring", 1.5, 0.5), one], dtype="float32") == []
    lines = disagreements([one, record("ring", 1.4, 0.25)], dtype="float32")
    assert lines[0].startswith(
        "none and ring disagree on losses: 1 of 2, most on that of step 2: 1.5 and 1.4"
    )
    assert "norms of gradients: 1 of 2, most on that of b: 0.5 and 0.25" in lines[1]
    # Not a number is a difference, and so is a gradient that is missing.
    missing = record("ring", float("nan"), 0.5) | {"gradient_norms": {"a": 1.0}}
    assert len(disagreements([one, missing], dtype="float32")) == 2
    # In 16 bits one process and two may differ more where a gradient is small.
    small = [record("lvx-ring", 1.5, 0.05), record("ring", 1.5, 0.055), record("none", 1.5, 0.055)]
    assert [line[:17] for line in disagreements(small, dtype="bfloat16")] == ["lvx-ring and ring"]


def test_a_frame_is_the_same_whoever_makes_it() -> None:
    whole = make_batch(CASE, frames=range(6), total=6)["pixel_values"]
    part = make_batch(CASE, frames=range(4, 6), total=6)["pixel_values"]
    assert part.equal(whole[:, 4:])
    assert not part[:, 0].equal(part[:, 1])


def task(*words: str, ranks: int = 2, **more: Any) -> Task:
    parser = argparse.ArgumentParser()
    model.add_arguments(parser)
    shared = {"model": "tiny", "dtype": "float32", "warmup": 1, "repeats": 2, "overlap": True}
    shared |= {"recompute": True, **more}
    options = argparse.Namespace(**vars(parser.parse_args(words)), **shared)
    return model.task_of(options, ranks=ranks)


def test_options_become_a_task() -> None:
    found = task("--hidden", "128", "--self-layers", "1", "--frames", "4")
    sizes = {"hidden": 128, "heads": 2, "kv_heads": 1, "mlp": 256, "self_layers": 1}
    assert found.case == replace(TINY, text_tokens=256, **sizes)
    assert (found.frames, found.repeats) == (4, 2)


@pytest.mark.parametrize("freeze", [False, True])
def test_a_vision_tower_trains_unless_it_is_frozen(freeze: bool) -> None:
    found = task(*["--freeze-vision"] * freeze)
    model = replace(found, case=replace(found.case, hidden=64, mlp=8)).build()
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    tower = {name for name, _ in model.named_parameters() if "vision_model" in name}
    assert frozen == (tower if freeze else set())


@pytest.mark.parametrize(
    ("words", "more", "message"),
    [
        (["--hidden", "96"], {}, "--hidden: got 96; expected a multiple of 64"),
        (["--cross-layers", "0"], {}, "--cross-layers: got 0; expected at least 1"),
        (["--frames", "1"], {}, "--frames: got 1 for 2 ranks"),
        ([], {"dtype": "float16"}, "--dtype: got float16; expected float32 or bfloat16"),
        (["--hidden", "64"], {"model": "a/b"}, "--model: got a/b with --hidden"),
    ],
)
def test_bad_options_are_said(words: list[str], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(*words, **more)


def test_a_checkpoint_s_own_sizes_count(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which cannot be read"):
        task(model=str(tmp_path))
    build_model(CASE).save_pretrained(tmp_path)
    found = task(model=str(tmp_path), ranks=9)
    assert found.case == replace(CASE, text_tokens=256, family="mllama")
    assert skipped(found, ("ulysses", "none"), ranks=9) == {
        "ulysses": "8 query heads for 9 ranks, in the text"
    }
    weights = dict(build_model(CASE, dtype=torch.float32).named_parameters())
    for name, weight in found.build().named_parameters():
        assert weight.dtype == torch.float32
        assert weight.equal(weights[name]), name
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="a model of type 'llama'; expected one of type 'mllama'"):
        task(model=str(tmp_path))


def test_methods_without_enough_heads_are_skipped_with_the_reason() -> None:
    methods = ["lvx-gather", "ulysses", "none"]
    assert skipped(TASK, methods, ranks=9) == dict.fromkeys(
        ("lvx-gather", "ulysses"), "8 query heads for 9 ranks, in the text"
    )
    by_ring = replace(TASK, text_method="ring")
    assert skipped(by_ring, methods, ranks=9) == {"ulysses": "8 query heads for 9 ranks"}
    mplug = replace(TASK, case=replace(TASK.case, family="mplugowl3"))
    assert skipped(mplug, methods, ranks=2) == {
        "ulysses": "release 241101 needs lse of its hyper layers"
    }


def test_a_cut_model_keeps_the_shape_of_its_heads() -> None:
    case = cut(TINY, hidden=192, vision_layers=1)
    assert (case.heads, case.kv_heads, case.hidden // case.heads) == (3, 3, 64)
    assert case.vision_global_layers == 1


@pytest.mark.slow
def test_table_plot_and_json(records: list[dict[str, Any]], tmp_path: Path) -> None:
    parts = model.results_of(TASK, Ranks(2), records, {"lvx-auto": "no reason"})
    results = {**header(device="cpu"), **parts}
    text = model.text(results)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(records)
    assert rows[-1].startswith("| ulysses | ")
    assert "lvx-auto was skipped: no reason." in text
    deliver(model, results, program="a test", folder=tmp_path)
    written = json.loads((tmp_path / "compare-model-tiny-ranks2-recompute.json").read_text())
    assert written["kind"] == "measured"
    assert written["records"][0]["step_s"]["samples"] == records[0]["step_s"]["samples"]
    assert written["records"][0]["sizes"]["visual_tokens"] == 6 * 17
    assert (tmp_path / "compare-model-tiny-ranks2-recompute.png").stat().st_size > 10_000
    heights = [bar.get_height() for bar in model.draw(results).axes[0].patches]
    sums = sum(sum(model.totals(record["typical"]).values()) for record in records)
    assert sum(heights) == pytest.approx(sums)


def test_the_document_has_the_table_of_the_committed_json() -> None:
    root = Path(__file__).resolve().parents[2] / "docs"
    name = "compare-model-tiny-ranks4-recompute-200mbit"
    results = json.loads((root / "benchmarks" / f"{name}.json").read_text())
    assert model.name(results) == name
    assert model.text(results) in (root / "comparing-models.md").read_text()
    for record in results["records"]:
        low, high = record["sum_of_parts_over_whole"]
        assert 1 - PARTS_MISS < low <= high < 1 + PARTS_MISS
