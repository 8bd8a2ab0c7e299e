"""The kernel benchmark: its cases, its checks, what it does about bad candidates, its tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.kernels import subject as kernels
from bench.kernels.candidates import Candidate, LeftOut, make, names
from bench.kernels.cases import DIRECTIONS, MEASURED, MOSS, PAPER, QUICK, TEXT, KernelCase
from bench.kernels.report import floors, floors_table, joined, measured_table
from bench.kernels.trial import (
    Bench,
    Timing,
    Trial,
    host_s,
)
from ds_lvx.compare.harness import RunError
from ds_lvx.compare.kernels import LEAST_SAMPLES, exact, is_right, samples_s
from ds_lvx.compare.operators.tensors import FRAMES
from tests.launch import dying_worker

GROUPED = QUICK[1]
"""24 queries, 2 query heads a key/value head, with visibility."""

Bad = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]


QUICKLY = Timing(device="cpu", repeats=3, seconds=0.01, quick=True, start="fork")
CPU = torch.device("cpu")


def results(*items: Trial, made: Any = make) -> dict[str, Any]:
    """Records by the name of their trial, measured in this process."""
    bench = Bench(QUICKLY, made)
    return {trial.name: bench.record(trial) for trial in items}


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_a_cases_shares_are_those_of_its_visibility(case: KernelCase) -> None:
    visible, seen = case.shares()
    drawn = case.draw(CPU)
    rule = drawn.visibility
    size = (1, *(t.shape[1] for t in (drawn.q, drawn.keys["k"])))
    mask = torch.ones(size, dtype=torch.bool) if rule is None else rule.mask()
    assert (case.shape.seqlen_q, len(case.keys)) == size[1:]
    assert visible == pytest.approx(mask.double().mean().item(), rel=1e-12)
    assert seen == mask.any(dim=1).double().mean().item()
    if case.shape.visibility == "prefix":  # of 3rd of 4 ranks, with frames 4 and 5 of 8
        assert rule is not None
        assert rule.kv_pos.unique().tolist() == [4, 5]
        assert visible == pytest.approx(3.5 / 8)
    else:
        assert visible == {"all": 1.0, "frames": 0.25}[case.shape.visibility]


def test_the_papers_shapes() -> None:
    plain = [(case.model, case.shape) for case in PAPER[::2]]
    shapes = [(m, s.seqlen_q, s.heads, s.kv_heads, s.head_dim) for m, s in plain]
    llama = [("mllama", queries, 32, 8, 128) for queries in (1, 192, 384, 4096)]
    others = [("mplug_owl3", 4096, 28, 4, 128), ("openflamingo", 32768, 8, 8, 64)]
    assert shapes == llama + others
    assert [round(shape.seqlen_kv / 1024) for _, shape in plain] == [125] * 4 + [91, 128]
    assert all(case.shape.visibility == "frames" for case in PAPER[1::2])
    assert all(case.shape.seqlen_kv % FRAMES == 0 for case in PAPER), "a quarter is not a quarter"


def test_moss_vls_shapes() -> None:
    assert {case.shape.seqlen_kv for case in MOSS} == {184_576}
    assert [len(case.keys) for case in MOSS[::2]] == [184_576, 92_288, 46_144, 23_072]
    assert MOSS[-1].name == "moss_vl-2304-of8-visibility"
    assert set(MEASURED) == {*PAPER, *MOSS, *TEXT}


@pytest.mark.parametrize("case", [*QUICK[:2], QUICK[-1]], ids=lambda case: case.name)
def test_all_candidates_of_a_cpu_are_right(case: KernelCase) -> None:
    candidates = ("auto", "native", "sdpa-flash", "sdpa-math")
    items = [Trial(case, name, direction) for name in candidates for direction in DIRECTIONS]
    found = results(*items)
    assert len(found) == len(items)
    for name, record in found.items():
        assert record["status"] == "ok", (name, record)
        assert len(record["device_s"]["samples"]) == 3
        assert 0 < max(record["errors"].values()) < 4e-2
    peer = found[f"{case.name}/sdpa-math/forward"]
    assert peer["kv"] == "in place"
    assert peer["mask_bytes"] == (0 if case.shape.visibility == "all" else 24 * len(case.keys))
    assert found[f"{case.name}/auto/forward"]["chosen"] == "native"


def test_repeated_heads_are_summed_before_they_are_checked(monkeypatch: Any) -> None:
    """As for a backend that wants as many heads of K and V as of q."""
    monkeypatch.setattr("bench.kernels.candidates._groups_heads", lambda *_: False)
    items = [Trial(GROUPED, "sdpa-math", direction) for direction in DIRECTIONS]
    for record in results(*items).values():
        assert record["status"] == "ok", record
        assert record["kv"] == "repeated beforehand, which is not timed"


def spoiled(right: Candidate, spoil: Bad) -> Candidate:
    """A right candidate whose results something is done to."""
    return replace(
        right,
        forward=lambda: spoil(right.forward()),
        backward=lambda: spoil(right.backward()),
        chosen=None,
    )


def last_row(place: int, value: float) -> Bad:
    """Adds to the last row of one of the results."""

    def spoil(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        copies = [tensor.clone() for tensor in found]
        copies[place].select(1, -1).add_(value)
        return tuple(copies)

    return spoil


def raises(error: Exception) -> Bad:
    def spoil(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        raise error

    return spoil


@pytest.mark.parametrize(
    ("direction", "spoil", "status", "word"),
    [
        ("forward", last_row(0, 0.1), "wrong", "out"),
        ("forward", last_row(0, float("nan")), "wrong", "out"),
        ("forward", last_row(1, float("-inf")), "wrong", "lse"),
        ("backward", last_row(0, 0.1), "wrong", "dq"),
        ("backward", last_row(1, 1.0), "wrong", "dk"),
        ("backward", last_row(2, 1.0), "wrong", "dv"),
        ("backward", last_row(2, float("nan")), "wrong", "dv"),
        ("forward", raises(torch.OutOfMemoryError("too large")), "failed", "too large"),
        ("backward", raises(RuntimeError("no kernel")), "failed", "no kernel"),
        ("forward", raises(LeftOut("no mask")), "left out", "no mask"),
    ],
)
def test_a_bad_candidate_is_told_and_does_not_stop_the_rest(
    direction: str, spoil: Bad, status: str, word: str
) -> None:
    bad, good = Trial(GROUPED, "triton", direction), Trial(GROUPED, "native", direction)

    def made(name: str, *operands: Any) -> Any:
        right = make("native", *operands)
        return spoiled(right, spoil) if name == "triton" else right

    found = results(bad, good, made=made)
    record = found[bad.name]
    assert record["status"] == status
    if status == "wrong":
        others = {name: error for name, error in record["errors"].items() if name[:3] != word[:3]}
        assert all(error < 4e-2 for error in others.values()), record
        assert float(record["errors"][word]) > 4e-2 or record["errors"][word] in ("nan", "inf")
    else:
        assert word in record["reason"]
    assert found[good.name]["status"] == "ok"


def test_a_gradient_that_is_not_finite_beside_the_checked_keys_is_wrong() -> None:
    known = exact(GROUPED.draw(CPU))
    found = list(make("native", known.problem, known.upstream).backward())
    assert is_right(known.errors("backward", found))
    unchecked = sorted(set(range(GROUPED.shape.seqlen_kv)) - set(known.keys.tolist()))
    found[1] = found[1].clone()
    found[1][0, unchecked[0], 0, 0] = float("nan")
    assert not is_right(known.errors("backward", found))


def test_what_a_backend_cannot_do_is_told_with_its_reasons() -> None:
    item = Trial(GROUPED, "sdpa-efficient", "forward")
    record = results(item)[item.name]
    assert record["status"] == "failed"
    assert "No viable backend" in record["reason"]


def test_scores_beyond_the_budget_are_not_materialised(monkeypatch: Any) -> None:
    monkeypatch.setattr("bench.kernels.candidates.SCORES_BYTES", 1000)
    item = Trial(GROUPED, "sdpa-math", "forward")
    record = results(item)[item.name]
    assert record["status"] == "left out"
    assert "GiB of scores" in record["reason"]


def test_inputs_that_cannot_be_made_are_every_candidates_reason(monkeypatch: Any) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("bench.kernels.trial.exact", fail)
    items = [Trial(GROUPED, name, "forward") for name in ("native", "auto")]
    for record in results(*items).values():
        assert record["status"] == "failed"
        assert "the inputs could not be made: OutOfMemoryError: no room" in record["reason"]


def test_a_candidate_that_ends_the_process_costs_itself_only() -> None:
    items = kernels.trials_of(QUICK[:2], ("triton", "native", "auto"))
    rates, *records = kernels.measure(items, QUICKLY, make=dying_worker.Dying)
    assert rates["matrix_flops"] == 1.0
    assert [record["name"] for record in records] == [item.name for item in items]
    for record in records:
        dies = record["candidate"] == "triton" and record["direction"] == "forward"
        assert record["status"] == ("failed" if dies else "left out")
        assert not dies or "the process ended" in record["reason"]


def test_a_candidate_that_hangs_is_ended() -> None:
    (item,) = kernels.trials_of(QUICK[:1], ("triton",), ["*/forward"])
    worker = kernels.Worker(dying_worker.Hanging, QUICKLY)
    for _ in range(2):
        with pytest.raises(RunError, match="was not done after 0 s"):
            worker.ask("record", item, limit_s=0.1)
    assert worker.ask("rates")["matrix_flops"] == 1.0
    worker.end()


def test_what_begins_too_late_is_left_out() -> None:
    items = kernels.trials_of(QUICK[:1], ("triton",))
    late = replace(QUICKLY, budget_s=-1.0)
    _, *records = kernels.measure(items, late, make=dying_worker.Dying)
    assert [record["reason"] for record in records] == ["the time of the whole run was over"] * 2


def test_a_worker_that_cannot_start_is_an_error() -> None:
    with pytest.raises(RunError, match="the process ended"):
        list(kernels.measure([], QUICKLY, make=dying_worker.refuse))


def test_only_takes_patterns_and_refuses_what_matches_nothing() -> None:
    found = kernels.trials_of(
        PAPER, names(), ["mllama-192*/triton/*", "openflamingo*/auto/forward"]
    )
    assert [item.name for item in found] == [
        "mllama-192/triton/forward",
        "mllama-192/triton/backward",
        "mllama-192-visibility/triton/forward",
        "mllama-192-visibility/triton/backward",
        "openflamingo-32768/auto/forward",
        "openflamingo-32768-visibility/auto/forward",
    ]
    with pytest.raises(ValueError, match=r"'lama/\*', which matches nothing.*mllama-192.*sdpa-"):
        kernels.trials_of(PAPER, names(), ["lama/*"])


def record(candidate: str, seconds: float | None) -> dict[str, Any]:
    about = {
        "name": f"{PAPER[1].name}/{candidate}/forward",
        "candidate": candidate,
        "ours": candidate in kernels.OURS,
        "direction": "forward",
    }
    if seconds is None:
        return {**about, "status": "failed", "reason": "a | b\nsecond line"}
    spread = {"median": seconds, "p10": seconds, "p90": seconds, "samples": [seconds]}
    return {**about, "status": "ok", "device_s": spread, "extra_bytes": 10**6, "chosen": "triton"}


RATES = {
    "matrix_flops": 800e12,
    "memory_bytes_per_s": 4e12,
    "matrix_size": 8192,
    "clock": "CUDA events",
}


def measured() -> dict[str, Any]:
    times = {
        "auto": 1.05e-4,
        "triton": 1e-4,
        "sdpa-flash": 4e-4,
        "sdpa-cudnn": 2e-4,
        "native": None,
    }
    records = [with_rates(record(name, s)) for name, s in times.items()]
    return {
        "device": "cuda",
        "hardware": {"device": "a card"},
        "rates": RATES,
        "records": records,
    }


def with_rates(own: dict[str, Any]) -> dict[str, Any]:
    return kernels.with_rates(Trial(PAPER[1], own["candidate"], "forward"), own, RATES)


def test_a_time_is_told_against_the_measured_rates() -> None:
    found = with_rates(record("triton", 1e-4))
    # One query that sees a quarter of 128,080 keys: nobody reads the others.
    assert found["flops"] == 4 * 128_080 / 4 * 32 * 128
    assert found["memory_bytes"] == 2 * 32 * 128 * 2 + 32 * 4 + 2 * 128_080 / 4 * 8 * 128 * 2
    assert found["bound"] == "memory"
    assert found["share_of_memory_rate"] == pytest.approx(found["floor_s"] / 1e-4)
    assert found["share_of_matrix_rate"] == pytest.approx(found["flops"] / 1e-4 / 800e12)


def test_faults_are_ours_and_more_than_a_lack_of_memory() -> None:
    bad = [record("native", None), record("sdpa-flash", None), record("triton", 1.0)]
    bad.append({**record("auto", None), "reason": "OutOfMemoryError: tried to allocate"})
    bad.append({**record("triton", None), "status": "wrong"})
    names = [f"mllama-1-visibility/{candidate}/forward" for candidate in ("native", "triton")]
    assert kernels.faults(bad) == names


def test_tables_never_round_in_our_favour() -> None:
    text = measured_table(measured())
    (line,) = [line for line in text.splitlines() if "| auto (triton) |" in line]
    assert "| sdpa-cudnn | 1.90 |" in line  # 1.9047...
    assert "at most 5.1% longer" in text  # 5.0000000000000044%
    (times,) = [line for line in text.splitlines() if "0.105 (0.105 to 0.105)" in line]
    assert times.endswith("| 0.4 (0.4 to 0.4) | 0.2 (0.2 to 0.2) | failed |")
    assert "- native failed: a / b (1: mllama-1-visibility/forward ...)" in text
    assert "no file" in measured_table(None)


def test_floors_name_what_binds_and_take_times_of_gpus_only() -> None:
    predicted = {"records": floors(PAPER[:2])}
    assert floors_table(predicted, None).count("| not measured |") == 4
    on_gpu = measured()
    text = floors_table(predicted, on_gpu)
    assert "Measured: `auto`, a card." in text
    assert "| 0.105 |" in text
    assert floors_table(predicted, {**on_gpu, "device": "cpu"}) == floors_table(predicted, None)
    first = predicted["records"][0]
    assert first["bound"] == dict.fromkeys(("A100-80", "H100", "H200", "B200"), "memory")


@pytest.mark.parametrize(("seconds", "taken"), [(0.5, 50), (0.02, 20), (0.001, 5)])
def test_slow_functions_run_less_often(seconds: float, taken: int, monkeypatch: Any) -> None:
    def measured(run: Any, seconds: float) -> list[float]:
        return [0.001] * max(round(seconds / 0.001), 1)

    monkeypatch.setattr("ds_lvx.compare.kernels._on_cpu", measured)
    assert len(samples_s(print, CPU, repeats=50, seconds=seconds)) == taken


@pytest.mark.gpu
def test_on_cuda_the_device_s_time_counts_and_the_host_s_stands_beside_it() -> None:
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    taken = samples_s(lambda: a @ a, a.device, repeats=7, seconds=1.0)
    assert LEAST_SAMPLES <= len(taken) <= 7  # as many as were expected to take the time
    assert min(taken) > 2 * 8192**3 / 4e15, "faster than any card: launched, not computed"
    assert max(host_s(lambda: a @ a, a.device)) < min(taken)


def test_a_second_measurement_gives_what_the_first_had_no_time_for() -> None:
    first = {
        "hardware": "a card",
        "versions": "1",
        "records": [
            {"name": "a", "status": "ok"},
            {"name": "b", "status": "left out"},
        ],
    }
    second = {
        **first,
        "records": [
            {"name": "a", "status": "failed"},
            {"name": "b", "status": "ok"},
            {"name": "c", "status": "ok"},
        ],
    }
    found = joined(first, second)["records"]
    assert [(r["name"], r["status"]) for r in found] == [("a", "ok"), ("b", "ok"), ("c", "ok")]
    with pytest.raises(ValueError, match="hardware: got another beside a card"):
        joined(first, {**second, "hardware": "another"})
