"""Whole steps side by side: the same losses and gradients, times that add up, and what is said."""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ds_lvx.compare.machine import header
from ds_lvx.compare.model import measure as model
from ds_lvx.compare.model import rank as model_rank
from ds_lvx.compare.model.breakdown import COLUMNS, PHASES
from ds_lvx.compare.model.job import TINY, Job, build, cut, make_batch
from ds_lvx.compare.model.measure import Plan, add_arguments, disagreements, plan_of, skipped
from ds_lvx.compare.model.rank import Request
from ds_lvx.compare.model.report import draw, table, totals
from tests.ranks import run_ranks

CASE = replace(TINY, hidden=64, mlp=64, text_tokens=24, image_size=28)
JOB = Job("tiny", CASE, frames=6, text_tokens=24)
PARTS_MISS = 0.05


def measured(request: Request) -> dict[str, Any]:
    """On a rank."""
    return model_rank.measure(request)


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """Two ranks against one process, at two ZeRO stages, with and without overlap."""
    requests = [
        (1, Request(JOB, "none")),
        (2, Request(JOB, "lvx-gather")),
        (2, Request(replace(JOB, zero_stage=3), "lvx-ring", overlap=False)),
        (2, Request(replace(JOB, checkpointing=True, text_method="ring"), "ulysses")),
    ]
    return [
        model.record(
            request.method, run_ranks(measured, ranks, replace(request, warmup=0, repeats=3))
        )
        for ranks, request in requests
    ]


def test_methods_agree_on_losses_and_every_gradient(records: list[dict[str, Any]]) -> None:
    assert disagreements(records, dtype="float32") == []
    for record in records:
        norms = record["gradient_norms"]
        assert sum(".cross_attn." in name for name in norms) == 2 * 6
        assert all(norm > 0 for name, norm in norms.items() if "k_proj" in name)
        # It trains: the optimizer's steps are part of what is compared.
        assert record["losses"][-1] < record["losses"][0]


def test_parts_add_up_to_the_step_and_each_is_there(records: list[dict[str, Any]]) -> None:
    for record in records:
        low, high = record["sum_of_parts_over_whole"]
        assert low <= high
        for answer in record["answers"]:
            # The median of three steps: during one the machine may have done something else.
            missed = [abs(_parts(step) / step["whole_s"] - 1) for step in answer["broken_down"]]
            assert statistics.median(missed) < PARTS_MISS, (record["method"], missed)
        for phase, columns in record["typical"]["parts_s"].items():
            computed = {name for name, seconds in columns.items() if seconds > 0}
            if phase != "optimizer":
                assert computed >= {"vision", "text", "cross_attention", "rest"}
            assert min(columns.values()) > -1e-9
            waits = "exposed_cross_attention" in computed
            assert waits == (record["ranks"] > 1 and phase != "optimizer"), (record, phase)


def _parts(step: dict[str, Any]) -> float:
    return sum(sum(columns.values()) for columns in step["parts_s"].values())


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
            "sizes": {},
            "losses": [1.0],
            "gradient_norms": {},
            "step_s": steps,
            "attention_bytes": [sent] * 3,
            "broken_down": [sample(seconds) for seconds in steps],
        }

    found = model.record("ring", [answer([3.0, 1.0, 1.0], 5), answer([1.0, 2.0, 7.0], 6)])
    assert found["step_s"]["samples"] == [3.0, 2.0, 7.0]
    assert found["typical"]["whole_s"] == 3.0
    assert found["parts_s"]["forward"]["text"]["median"] == pytest.approx(3.03)
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
    assert lines[0].startswith("none and ring disagree on the loss of step 2: 1.5 and 1.4")
    assert "gradients of 1 parameters, most on b: norms 0.5 and 0.25" in lines[1]
    # Not a number is a difference, and so is a gradient that is missing.
    missing = record("ring", float("nan"), 0.5) | {"gradient_norms": {"a": 1.0}}
    assert len(disagreements([one, missing], dtype="float32")) == 2
    # In 16 bits one process and two may differ more where a gradient is small.
    small = [record("lvx-ring", 1.5, 0.05), record("ring", 1.5, 0.055), record("none", 1.5, 0.055)]
    assert [line[:17] for line in disagreements(small, dtype="bfloat16")] == ["lvx-ring and ring"]


def test_a_frame_is_the_same_whoever_makes_it() -> None:
    config = build(JOB).config
    whole = make_batch(JOB, config, frames=range(6))["pixel_values"]
    part = make_batch(JOB, config, frames=range(4, 6))["pixel_values"]
    assert part.equal(whole[:, 4:])
    assert not part[:, 0].equal(part[:, 1])


def options(*words: str, **more: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    shared = {"model": "tiny", "dtype": "float32", "ranks": 2, "warmup": 1}
    shared |= {"repeats": 2, "overlap": True, "recompute": True, "network": None, "threads": 1}
    shared |= {"device": "cpu", "timeout_s": 60.0, "methods": ("lvx-gather", "ring")}
    return argparse.Namespace(**vars(parser.parse_args(words)), **{**shared, **more})


def test_options_become_a_plan() -> None:
    plan = plan_of(options("--hidden", "128", "--self-layers", "1", "--frames", "4"))
    sizes = {"hidden": 128, "heads": 2, "kv_heads": 1, "mlp": 256, "self_layers": 1}
    assert plan.job.case == replace(TINY, text_tokens=256, **sizes)
    assert (plan.job.frames, plan.job.text_tokens, plan.repeats) == (4, 256, 2)
    assert plan.methods == ("lvx-gather", "ring")


@pytest.mark.parametrize(
    ("words", "more", "message"),
    [
        (["--hidden", "96"], {}, "--hidden: got 96; expected a multiple of 64"),
        (["--cross-layers", "0"], {}, "--cross-layers: got 0; expected at least 1"),
        (["--frames", "1"], {}, "--frames: got 1 for 2 ranks"),
        ([], {"methods": ["rings"]}, "--methods: got 'rings'; expected some of: lvx-gather"),
        ([], {"dtype": "float16"}, "--dtype: got float16; expected float32 or bfloat16"),
        (["--hidden", "64"], {"model": "a/b"}, "--model: got a/b with --hidden"),
        ([], {"repeats": 0}, "0 repeats"),
    ],
)
def test_bad_options_are_said(words: list[str], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(options(*words, **more))


def test_a_checkpoint_s_own_sizes_count(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which cannot be read"):
        plan_of(options(model=str(tmp_path)))
    build(JOB).config.save_pretrained(tmp_path)
    plan = plan_of(options(model=str(tmp_path), ranks=9, methods=("ulysses", "none")))
    assert plan.job.case is None
    assert skipped(plan) == {"ulysses": "8 query heads for 9 ranks, in the text"}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="a model of type 'llama'; expected one of type 'mllama'"):
        plan_of(options(model=str(tmp_path)))


def test_methods_without_enough_heads_are_skipped_with_the_reason() -> None:
    plan = Plan(JOB, ["lvx-gather", "ulysses", "none"], ranks=9)
    assert skipped(plan) == dict.fromkeys(
        ("lvx-gather", "ulysses"), "8 query heads for 9 ranks, in the text"
    )
    by_ring = replace(plan, job=replace(JOB, text_method="ring"))
    assert skipped(by_ring) == {"ulysses": "8 query heads for 9 ranks"}


def test_a_cut_model_keeps_the_shape_of_its_heads() -> None:
    case = cut(TINY, hidden=192, vision_layers=1)
    assert (case.heads, case.kv_heads, case.hidden // case.heads) == (3, 3, 64)
    assert case.vision_global_layers == 1


def test_table_plot_and_json(records: list[dict[str, Any]], tmp_path: Path) -> None:
    plan = Plan(JOB, [record["method"] for record in records], ranks=2, repeats=1)
    parts = model.results_of(plan, records, {"lvx-auto": "no reason"})
    results = {**header(device="cpu"), **parts}
    text = table(results)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(records)
    assert rows[-1].startswith("| ulysses | ")
    assert "lvx-auto was skipped: no reason." in text
    model.write(results, tmp_path)
    written = json.loads((tmp_path / "compare-model-tiny-ranks2-recompute.json").read_text())
    assert written["kind"] == "measured"
    assert written["records"][0]["step_s"]["samples"] == records[0]["step_s"]["samples"]
    assert (tmp_path / "compare-model-tiny-ranks2-recompute.png").stat().st_size > 10_000
    heights = [bar.get_height() for bar in draw(results).axes[0].patches]
    sums = sum(sum(totals(record["typical"]).values()) for record in records)
    assert sum(heights) == pytest.approx(sums)
