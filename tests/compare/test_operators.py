"""The comparison of operators: what it measures, checks, refuses and writes."""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_lvx import cli
from ds_lvx.attention import ring
from ds_lvx.compare import command, harness
from ds_lvx.compare.document import deliver
from ds_lvx.compare.harness import METHODS, Lab, Ranks
from ds_lvx.compare.network import Network, NetworkError
from ds_lvx.compare.operators import exactness, subject
from ds_lvx.compare.operators import rank as operators
from ds_lvx.compare.operators.attend import NotingKernel
from ds_lvx.compare.operators.rank import Contest
from ds_lvx.compare.operators.tensors import Shape, make_shards
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.interface import Problem, Upstream
from tests.ranks import run_ranks

TINY = Shape(seqlen_q=9, seqlen_kv=30, batch=2, heads=4, kv_heads=2, head_dim=8, dtype="float32")
ONCE = Contest(TINY, tuple(METHODS), warmup=0, repeats=2)
DEVICE = torch.device("cpu")


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def measured(requests: list[Contest]) -> list[dict[str, Any]]:
    return [operators.measure(request) for request in requests]


def assembled(
    request: Contest,
    answers: list[dict[str, Any]],
    *,
    network: Network | None = None,
    skipped: dict[str, str] | None = None,
) -> dict[str, Any]:
    ranks = Ranks(len(answers), network=network)
    return subject.assemble(request, answers, ranks, skipped=skipped or {})


# ---- measuring


@pytest.mark.slow
def test_every_method_is_checked_counted_and_timed(tmp_path: Path) -> None:
    seen = replace(TINY, visibility="frames", features_dim=12)
    requests = [
        ONCE,
        replace(ONCE, shape=seen, overlap=False),
        replace(ONCE, shape=seen, recompute=True),
        replace(ONCE, shape=replace(TINY, visibility="causal", dtype="bfloat16")),
    ]
    by_rank = run_ranks(measured, 3, requests)
    for request, *answers in zip(requests, *by_rank, strict=True):
        results = assembled(request, json.loads(json.dumps(answers)))
        assert [record["method"] for record in results["records"]] == list(METHODS)
        for record in results["records"]:
            assert len(record["ranks"]) == (1 if record["method"] == "none" else 3)
            assert len(record["step_s"]["samples"]) == 2
            assert record["step_s"]["median"] >= record["forward_s"]["median"] > 0
            assert record["kernels_s"]["median"] > 0
        exact = [d for d in results["largest_differences"] if d["other"] == exactness.EXACT]
        tensors = {"out", "dq", "dfeatures", "dk_proj", "dv_proj"}
        assert {d["tensor"] for d in exact} == (
            tensors if request.shape.features_dim else {"out", "dq", "dk", "dv"}
        )
        assert {d["one"] for d in exact} == set(METHODS) - {"none"}
    command.show(results, options("--output", str(tmp_path), "--json"))
    (written,) = tmp_path.glob("*.json")
    assert json.loads(written.read_text()) == json.loads(json.dumps(results))
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_zigzag_is_measured_beside_contiguous() -> None:
    """Both ways against the oracle, then timed; the processor's own seconds of every rank."""
    shape = replace(TINY, seqlen_kv=9, visibility="causal")
    methods = ("lvx-ring", "ring", "none", "gathered")
    request = replace(ONCE, shape=shape, methods=methods, orders=("contiguous", "zigzag"))
    answers = [answer for (answer,) in run_ranks(measured, 3, [request])]
    results = assembled(request, json.loads(json.dumps(answers)))
    labels = [*methods, "lvx-ring zigzag", "ring zigzag", "gathered zigzag"]
    assert [record["method"] for record in results["records"]] == labels
    exact = {d["one"] for d in results["largest_differences"] if d["other"] == exactness.EXACT}
    assert exact == set(labels) - {"none"}
    bytes_sent = {record["method"]: record["bytes_sent"] for record in results["records"]}
    assert bytes_sent["ring zigzag"] == bytes_sent["ring"]
    for record in results["records"]:
        assert len(record["kernels_processor_s"]) == len(record["ranks"])
    assert subject.name(results) == "compare-q9-kv9-ranks3-causal-zigzag"
    assert "| kernels a rank, processor s |" in subject.text(results)
    subject.draw(results)


def test_zigzag_is_of_causal_text() -> None:
    asked = options("--orders", "zigzag", "--visibility", "frames")
    command.settle_measurement(asked)
    with pytest.raises(ValueError, match="--orders: got zigzag with --visibility frames; expected"):
        command.contest_of(asked, 2)


@pytest.mark.slow
def test_bytes_are_those_of_the_formulas() -> None:
    answers = [answer for (answer,) in run_ranks(measured, 3, [ONCE])]
    found = {record["method"]: record for record in assembled(ONCE, answers)["records"]}
    rows, keys, width = TINY.batch * 3 * 4, TINY.batch * 10 * 2 * 8 * 4, 8 * 4
    lvx = 2 * rows * (2 * width + 4 + 3 * width + 8)
    assert found["lvx-gather"]["bytes_sent"] == pytest.approx(lvx, rel=0.02)
    assert found["lvx-ring"]["bytes_sent"] == pytest.approx(lvx, rel=0.02)
    assert found["ring"]["bytes_sent"] == 2 * 6 * keys
    assert found["none"]["bytes_sent"] == 0


def disagreeing() -> dict[str, Any]:
    def wrong(*tensors: Any) -> Any:
        out, lse = right(*tensors)
        if Channel.world().rank == 1:
            out = out + 1e-3 * out.detach().abs().max() * (torch.arange(8) == 5)
        return out, lse

    right = ring.attend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring, "attend", wrong)
        return operators.measure(replace(ONCE, methods=("lvx-gather", "ring")))


def test_methods_that_disagree_are_named_and_not_timed() -> None:
    answers = run_ranks(disagreeing, 2)
    assert [answer["methods"] for answer in answers] == [{}, {}]
    with pytest.raises(subject.DisagreementError) as raised:
        assembled(ONCE, answers)
    lines = str(raised.value).splitlines()
    pairs = {line.split(" disagree")[0].strip() for line in lines[1:]}
    assert pairs == {"lvx-gather and ring", "ring and float64 oracle"}
    with pytest.raises(subject.DisagreementError) as raised:
        assembled(ONCE, answers * 10)
    every = str(raised.value).splitlines()
    assert (len(every), every[-1]) == (12, f"  and {10 * len(lines[1:]) - 10} more")
    for line in lines[1:]:
        assert " disagree on out: the largest error is 0.001 of the largest value" in line
        assert "on rank 1 at [" in line
        assert ", 5] of its shard: " in line


def test_what_is_not_a_number_disagrees() -> None:
    ones = torch.ones(2, 3)
    broken = ones.clone()
    broken[1, 2] = torch.nan
    (found,) = exactness.differences(
        {"ring": {"out": ones}, "lvx": {"out": broken}}, dtype="float32", rank=0, shape="whole"
    )
    assert found.is_too_large
    assert found.index == (1, 2)
    same = {"ring": {"out": ones * 0, "dk": ones[:0]}, "lvx": {"out": ones * 0, "dk": ones[:0]}}
    (found,) = exactness.differences(same, dtype="float32", rank=0, shape="whole")
    assert found.error == 0.0


def test_the_small_shape_is_the_whole_one_where_the_oracle_can_do_it() -> None:
    assert exactness.small(TINY) == TINY
    large = Shape(seqlen_q=4096, seqlen_kv=2**20, heads=32)
    small = exactness.small(large)
    assert small.seqlen_q * small.seqlen_kv * small.heads <= 2**21
    assert replace(small, seqlen_q=4096, seqlen_kv=2**20) == large


@pytest.mark.parametrize(
    ("cores", "ranks", "shares"),
    [
        ({0, 1}, 4, [[0], [0], [1], [1]]),
        ({2, 3, 5, 7}, 2, [[2, 3], [5, 7]]),
        ({0, 1, 2}, 2, [[0], [1, 2]]),
        ({4}, 2, [[4], [4]]),
    ],
)
def test_ranks_share_the_cores(
    cores: set[int], ranks: int, shares: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = []
    monkeypatch.setattr(harness.os, "sched_getaffinity", lambda pid: cores)
    monkeypatch.setattr(harness.os, "sched_setaffinity", lambda pid, own: bound.append(own))
    for rank in range(ranks):
        harness.bind(rank, ranks)
    assert bound == shares


class CountingKernel:
    """Writes down its calls."""

    name = "counting"

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def forward(self, problem: Problem, **options: Any) -> Any:
        self.seen.append(("forward", problem, options))
        return problem.q, problem.q

    def fold(self, problem: Problem, running: Any, **options: Any) -> None:
        self.seen.append(("fold", problem, options))
        running[0].add_(1)

    def backward(self, problem: Problem, upstream: Upstream, **options: Any) -> Any:
        self.seen.append(("backward", problem, options))
        return problem.q, problem.q, problem.q


def described(seen: list[Any]) -> list[Any]:
    return [
        (name, problem.q.shape, problem.softmax_scale, problem.partial, options)
        for name, problem, options in seen
    ]


def test_noted_calls_are_made_again() -> None:
    inner = CountingKernel()
    noting: Any = NotingKernel(inner)
    one, two, long = torch.zeros(3), torch.ones(3), torch.zeros(5)
    noting.forward(Problem(one, one, one, softmax_scale=0.5, partial=True))
    running = (torch.zeros(3), torch.zeros(3))
    noting.fold(Problem(two, two, two, softmax_scale=0.5), running)
    noting.forward(Problem(long, one, one, softmax_scale=0.5))
    noting.backward(Problem(one, one, one, softmax_scale=0.5), Upstream(one, one, one), into=(one,))
    assert inner.seen[-1][2].pop("into") == (one,)
    assert running[0].tolist() == [1, 1, 1]
    begun = inner.seen
    inner.seen = []
    noting.repeat(0, 4)
    assert described(inner.seen) == described(begun)
    assert inner.seen[1][1].q.data_ptr() == one.data_ptr(), (
        "one tensor serves for all that look like it"
    )
    assert running[0].tolist() == [1, 1, 1], "a repeated fold changed the real result"
    inner.seen = []
    noting.repeat(3, 4)
    assert [name for name, *_ in inner.seen] == ["backward"]


# ---- inputs


@pytest.mark.parametrize("features_dim", [None, 6])
@pytest.mark.parametrize("visibility", ["all", "causal", "frames"])
def test_shards_make_up_the_whole(features_dim: int | None, visibility: str) -> None:
    shape = replace(TINY, features_dim=features_dim, visibility=visibility)
    parts = [make_shards(shape, ranks=4, shards=[r], device=DEVICE) for r in range(4)]
    whole = make_shards(shape, ranks=4, shards=range(4), device=DEVICE)
    assert whole.q.shape == (2, 9, 4, 8)
    assert torch.equal(torch.cat([part.q for part in parts], dim=1), whole.q)
    k = torch.cat([part.k_and_v()[0] for part in parts], dim=1)
    torch.testing.assert_close(k, whole.k_and_v()[0])
    assert k[:, :8].std() < k[:, -7:].std(), "shards differ in scale"
    if whole.visibility is not None:
        shards = [part.visibility for part in parts]
        for name in ("q_start", "q_end", "kv_pos"):
            pieces = [getattr(shard, name) for shard in shards]
            assert torch.equal(torch.cat(pieces, dim=1), getattr(whole.visibility, name))
        seen = whole.visibility.mask()[0].float().mean(dim=1)
        assert seen[-1] == (1.0 if visibility == "causal" else pytest.approx(0.25, abs=0.05))


# ---- the command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "rign"], "--methods: got 'rign'; expected some of .*did you mean 'ring'"),
        (["--network", "200"], "--network: got '200', which has no unit"),
        (["--network", "200mbit", "--device", "accelerator"], "leave one of both away"),
        (["--ranks", "0"], "--ranks: got 0; expected at least 1"),
        (["--repeats", "0"], "--repeats: got 0; expected at least 1"),
        (["--threads", "0"], "--threads: got 0; expected at least 1"),
        (["--seqlen-q", "64X"], "--seqlen-q: got '64X'; expected a whole number"),
        (["--kv-heads", "3"], "--kv-heads: got 3 for 8 query heads; expected a divisor of 8"),
        (["--head-dim", "0"], "--head-dim: got 0; expected at least 1"),
        (["--features-dim", "0"], "--features-dim: got 0; expected at least 1"),
        (["--methods", "ulysses", "--heads", "2"], "none is left: got 2 query heads for 4 ranks"),
        (["--frames", "3"], "--frames: got 3 without --model, .*; add --model, or leave this out"),
        (["--model", "tiny", "--seqlen-q", "9"], "--seqlen-q: got 9 with --model, .*; leave out"),
        (["--render", "none.json"], "--render: got none.json .*expected a JSON that --output has"),
        (["--render", "pyproject.toml"], "--render: got pyproject.toml .*expected a JSON that"),
        (["--output", "/proc/x"], "--output: got /proc/x .*expected a folder"),
        (["--document", "none.md"], "--document: got none.md, which is no file"),
    ],
)
def test_bad_options_are_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ds-lvx compare: ")
    assert re.search(message, error), error


def test_a_method_that_cannot_do_the_shape_is_skipped_with_the_reason() -> None:
    chosen = options("--heads", "2", "--ranks", "4", "--recompute")
    command.settle_measurement(chosen)
    request, skipped = command.contest_of(chosen, 4)
    assert request.methods == ("lvx-gather", "lvx-ring", "ring", "none")
    assert list(skipped) == ["ulysses"]
    assert skipped["ulysses"].startswith("got 2 query heads for 4 ranks")
    assert request.shape.features_dim == 128
    assert request.recompute


def test_defaults_are_both_schedules_and_all_peers() -> None:
    chosen = options("--seqlen-q", "64", "--seqlen-kv", "64K", "--no-overlap")
    command.settle_measurement(chosen)
    request, _ = command.contest_of(chosen, 4)
    assert request.methods == ("lvx-gather", "lvx-ring", "ulysses", "ring", "none")
    assert (request.shape.seqlen_q, request.shape.seqlen_kv) == (64, 65536)
    assert not request.overlap
    assert not request.recompute


def test_ranks_are_as_many_as_this_machine_has_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = SimpleNamespace(device_name=lambda: "cuda", device_count=lambda: 3)
    monkeypatch.setattr(harness, "get_accelerator", lambda: cards)
    monkeypatch.setattr(harness, "cores", lambda: 8)
    assert Ranks.here(timeout_s=9.0) == Ranks(3, 2, "cuda", timeout_s=9.0)
    assert Ranks.here(5, device="cpu") == Ranks(5, 1)
    # The links between devices are not what is emulated.
    slow = Network.parse("200mbit")
    assert Ranks.here(threads=3, network="200mbit", otherwise=2) == Ranks(2, 3, network=slow)
    with pytest.raises(ValueError, match="--ranks: got 4 for 3 devices; expected one for each"):
        Ranks.here(4)


def test_without_root_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(lab: Any) -> Any:
        raise NetworkError("netlab: got user somebody; making network namespaces needs root.")

    monkeypatch.setattr(Lab, "__enter__", refuse)
    assert cli.main(["compare", "--network", "200mbit"]) == 1
    assert "making network namespaces needs root" in capsys.readouterr().err


# ---- the report


def answer(seconds: dict[str, float], payload: int = 1010) -> dict[str, Any]:
    return {
        "differences": [],
        "methods": {
            method: {
                "step": {"forward_s": [own, own], "backward_s": [2 * own, 3 * own]},
                "kernels": {
                    "forward_s": [0.5, 0.5],
                    "backward_s": [0.5, 0.5],
                    "processor_s": [1.0],
                },
                "traffic": {"bytes_sent": 900, "calls": 2, "control_bytes": 100},
                "interface": {"sent_payload_bytes": payload},
                "schedule": "gather",
            }
            for method, own in seconds.items()
        },
    }


def test_the_slowest_rank_counts_and_ratios_are_rounded_down() -> None:
    times = ({"lvx-gather": 0.3, "ring": 7.0}, {"lvx-gather": 0.4, "ring": 6.0})
    answers = [answer(times[0]), answer(times[1], payload=980)]
    results = assembled(
        ONCE, answers, network=Network.parse("200mbit,1ms"), skipped={"ulysses": "no"}
    )
    lvx, _ = results["records"]
    assert lvx["step_s"]["samples"] == pytest.approx([1.2, 1.6])
    assert lvx["step_s"]["median"] == pytest.approx(1.4)
    assert lvx["step_s"]["p10"] == pytest.approx(1.24)
    assert lvx["step_over_kernels"] == pytest.approx(1.4)
    assert lvx["exposed_s"] == pytest.approx(0.4)
    assert lvx["times_faster_than"] == {"ring": pytest.approx(24.5 / 1.4)}
    assert lvx["interface_over_traffic"] == pytest.approx(0.98)
    assert results["kind"] == "emulated"
    assert results["network"]["bits_per_s"] == 200 * 10**6
    text = subject.text(results)
    assert "| 1.400 (1.240 to 1.560) | 1.000 | 1.40 | 0.001 | 17.5 | - |" in text
    assert math.floor(24.5 / 1.4 * 10) / 10 == 17.5
    assert "ulysses: skipped, no" in text
    assert subject.name(results) == "compare-q9-kv30-ranks2-200mbit-1ms"


def test_the_table_goes_between_its_comment_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = assembled(ONCE, [answer({"ring": 1.0})])
    document = tmp_path / "page.md"
    document.write_text("before\n")
    with pytest.raises(ValueError, match="followed by"):
        deliver(subject, results, program="ds-lvx compare", document=document)
    assert subject.text(results) in capsys.readouterr().out, "what was measured is not lost"
    lines = [f"<!-- ds-lvx compare, {subject.name(results)}: {e} -->" for e in ("begin", "end")]
    document.write_text("\n".join(["before", *lines, "after\n"]))
    for _ in range(2):
        deliver(subject, results, program="ds-lvx compare", document=document)
    text = document.read_text()
    assert text.count(subject.text(results)) == 1
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_a_plot_without_ring_compares_with_the_slowest() -> None:
    results = assembled(ONCE, [answer({"lvx-gather": 1.0, "ulysses": 2.0})])
    _, ratios = subject.draw(results).axes
    assert ratios.get_xlabel() == "times faster than ulysses"
    assert [bar.get_width() for bar in ratios.patches] == [1.0, 2.0]


def test_networks_are_recorded_by_their_short_form() -> None:
    record = Network(10**9, 1e-3).record(2)
    assert (record["name"], record["latency_s"]) == ("1gbit,1ms", 1e-3)
    assert record["how"].startswith("one network namespace for 2 ranks, each behind")


def test_the_document_has_the_tables_of_the_committed_json() -> None:
    """And nothing where zigzag was not measured."""
    docs = Path(__file__).resolve().parent.parent.parent / "docs"
    text = (docs / "comparing.md").read_text()
    places = re.findall(r"<!-- ds-lvx compare, (\S+): begin -->(.*?)<!-- ds-lvx", text, re.DOTALL)
    assert places
    for name, stands in places:
        committed = docs / "benchmarks" / f"{name}.json"
        if "zigzag" in name and not committed.exists():
            assert not stands.strip(), name
            continue
        results = json.loads(committed.read_text())
        assert results["kind"] == "emulated"
        assert subject.text(results) in stands, name
