"""Measuring this machine: the fit, and one run from end to end."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from bench.pooled import pooled
from ds_lvx.plan import calibrate, command, fit, profile
from ds_lvx.plan.cluster import Cluster, KernelTime
from tests.forked import fork_fresh_ranks

HEADS = {"heads": 8, "kv_heads": 2, "head_dim": 64}


SHAPES = [{"seqlen_q": s, "seqlen_kv": t} for s in (1, 64, 1024) for t in (128, 4096, 65_536)]


def of(time: KernelTime, shape: dict[str, int]) -> float:
    return time.seconds(shape["seqlen_q"], shape["seqlen_kv"], width=8 * 64, kv_width=2 * 64)


def test_the_fit_finds_what_made_the_samples() -> None:
    true = KernelTime(call_s=2e-5, pair_s=3e-12, key_s=4e-10, row_s=5e-10)
    found = fit.kernel_time(SHAPES, [of(true, shape) for shape in SHAPES], **HEADS)
    for name in ("call_s", "pair_s", "key_s", "row_s"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-6)
    assert [ratio for _, _, ratio in found.ratios] == pytest.approx([1.0] * len(SHAPES))


def test_what_the_terms_miss_is_kept_and_interpolated() -> None:
    seconds = [1e-3, 2e-3, 9e-2, 1e-3, 3e-2, 5e-1, 4e-2, 1e-1, 4.0]  # as with caches, no terms fit
    found = fit.kernel_time(SHAPES, seconds, **HEADS)
    assert [of(found, shape) for shape in SHAPES] == pytest.approx(seconds, rel=2e-3)
    between = of(found, {"seqlen_q": 64, "seqlen_kv": 16_384})
    assert seconds[4] < between < seconds[5]


def test_no_term_is_below_zero_however_the_samples_lie() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        columns = generator.uniform(0.1, 10, size=(12, 4))
        seconds = generator.uniform(0.1, 10, size=12)
        factors = fit.not_negative([list(row) for row in columns], list(seconds))
        assert min(factors) >= 0
        assert max(factors) > 0


def test_a_link_is_what_was_measured_and_goes_on_at_its_last_rate() -> None:
    sizes = [1.0, 2.0**14, 2.0**18, 2.0**22]
    seconds = [1e-4, 1e-3, 2e-2, 2e-1]
    found = fit.wire(sizes, seconds)
    assert found.latency_s == pytest.approx(1e-4)
    for size, each in zip(sizes, seconds, strict=True):
        assert found.latency_s + found.busy_s(size) == pytest.approx(each, rel=1e-3)
    assert found.busy_s(2**23) == pytest.approx(found.busy_s(2**22) + 2**22 / found.bytes_per_s)
    assert found.bytes_per_s == pytest.approx((2**22 - 2**18) / 0.18)
    assert found.busy_s(0) == 0


def test_noise_does_not_make_larger_messages_faster() -> None:
    found = fit.wire([1.0, 1e4, 1e5, 1e6], [1e-4, 5e-3, 3e-3, 2e-3])
    times = [found.busy_s(size) for size in (1e3, 1e4, 1e5, 1e6, 1e7)]
    assert times == sorted(times)
    assert found.bytes_per_s > 0


def test_the_slowest_rank_counts() -> None:
    answers = [{"seconds": [1.0, 5.0, 2.0]}, {"seconds": [3.0, 1.0, 2.5]}]
    assert fit.slowest(answers) == 3.0
    assert fit.slowest(answers, at=0.25) == 2.75  # between 2.5 and 3.0


def test_what_new_memory_and_a_token_cost() -> None:
    new = {"numbers": 1000, "bytes_written": 4, "seconds": [5e-6]}
    common = {"new": new, "elementwise": {"seconds": [1e-6]}}
    common |= {"weights": {"bytes": 1, "seconds": [1.0]}}
    # A token takes 5 ms, a layer of text 1 ms, one of cross-attention 3 ms; 20 ms until it begins.
    steps = [
        {"text": text, "cross": cross, "seconds": [5e-3 + text * 1e-3 + cross * 3e-3]}
        for text, cross in ((2, 1), (6, 1), (3, 3))
    ]
    steps = [{**each, "begin_seconds": [20e-3 + each["seconds"][0]]} for each in steps]
    found = fit._one_token([{**common, "steps": steps}])
    assert found["new_byte_s"] == pytest.approx(1e-9)
    names = ("token_s", "layer_s", "cross_layer_s", "begin_s")
    assert [found[name] for name in names] == pytest.approx([5e-3, 1e-3, 3e-3, 20e-3])
    # On several ranks a layer's collective counts by itself.
    gather = {"transfers": {"gather": [{"bytes": 1, "seconds": [4e-4]}]}}
    found = fit._one_token([{**common, **gather, "steps": steps}] * 2)
    assert found["cross_layer_s"] == pytest.approx(3e-3 - 4e-4)
    assert fit._one_token([common]) == {}


def test_what_a_hidden_transfer_costs_the_kernel_above_it() -> None:
    times = {"kernel": [0.05], "shifts": [0.01], "both": [0.054]}  # two of them, 2 ms each
    kinds = ("shift", "gather", "exchange", "shifts")
    messages = [{"bytes": size, "seconds": [size / 1e9]} for size in (10**3, 10**6)]
    transfers = dict.fromkeys(kinds, messages)
    device = "NVIDIA H100"  # whose transfers take none of the processor's time
    answers = [{"device": device, "hidden": [{"bytes": 1, **times}], "transfers": transfers}] * 2
    found = fit.link(answers)
    assert found.drag_s == pytest.approx(2e-3)
    assert found.shifts.bytes_per_s == pytest.approx(2e9)
    waiting = {"kernel": [0.05], "shifts": [0.2], "both": [0.2]}  # nothing but the network
    answers = [{"device": device, "hidden": [{"bytes": 1, **waiting}], "transfers": transfers}] * 2
    assert fit.link(answers).drag_s == 0
    assert fit.link(answers).processor_s == 0


def test_what_sending_takes_of_a_cpu() -> None:
    """A byte's share of the processor's time, and as much again where two ranks share a core."""
    kernel = {"seqlen_q": 64, "seqlen_kv": 64}
    kernels = {
        "whole": [{**kernel, "seconds": [0.2, 0.2, 0.2]}],
        "whole_alone": [{**kernel, "seconds": [0.1, 0.1, 0.1]}],
    }
    samples = {"seconds": [0.01, 0.01, 0.01], "processor_seconds": [0.003, 0.002, 0.009]}
    messages = [{"bytes": size, **samples} for size in (10**3, 10**6)]
    transfers = dict.fromkeys(("shift", "gather", "exchange", "shifts"), messages)
    hidden = [{"bytes": 1, "kernel": [0.05], "shifts": [0.01], "both": [0.05]}]
    answer = {"kernels": kernels, "hidden": hidden, "transfers": transfers}
    assert fit.link([{"device": "cpu X", **answer}] * 2).processor_s == pytest.approx(6e-9)


def test_a_rings_transfers_count_by_the_pair() -> None:
    """Four ranks have three of them; a pair is what two transfers at once are asked for."""
    messages = [{"bytes": size, "seconds": [3 * size / 1e9]} for size in (10**3, 10**6)]
    transfers = dict.fromkeys(("shift", "gather", "exchange", "shifts"), messages)
    hidden = {"kernel": [0.05], "shifts": [0.01], "both": [0.05]}
    answer = {"device": "NVIDIA H100", "hidden": [{"bytes": 1, **hidden}], "transfers": transfers}
    found = fit.link([answer] * 4)
    assert found.shifts.bytes_per_s == pytest.approx(2e9)
    assert found.shifts.busy_s(2e6) == pytest.approx(1e-3, rel=0.01)


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a calibration on two ranks wrote."""
    path = tmp_path_factory.mktemp("calibration") / "profile.json"
    words = ("--calibrate", "--ranks", "2", "--quick", "--profile", str(path))
    with pytest.MonkeyPatch.context() as patch:
        fork_fresh_ranks(patch)
        assert command.run(options(*words)) == 0
    return path


@pytest.mark.slow
def test_a_calibration_from_end_to_end(measured: Path) -> None:
    cluster = profile.read(measured)
    assert (cluster.gpus, cluster.gpus_per_node) == (2, 2)
    record = json.loads(measured.read_text())
    assert record["kind"] == "measured"
    assert record["versions"]["torch"]
    assert len(record["answers"]) == 2
    device = cluster.device
    for kernel in (device.whole, device.partial, device.backward):
        assert kernel.seconds(100, 100, width=64, kv_width=64) > 0
    for kernel in (device.whole_alone, device.backward_alone):
        assert kernel is not None
        assert kernel.seconds(100, 100, width=64, kv_width=64) > 0
    assert 0 < device.alone <= 1
    assert device.stream_bytes_per_s > 0
    for wire in (cluster.within.shift, cluster.within.gather, cluster.within.exchange):
        assert 0 < wire.bytes_per_s < 1e13
    again = calibrate.refit(record)
    assert Cluster.of(again["cluster"]) == cluster
    # And it serves a plan.
    asked = ("--model", "OpenFlamingo-3B", "--frames", "64", "--gpus", "4096", "--json")
    assert command.run(options(*asked, "--profile", str(measured))) == 0


@pytest.mark.slow
def test_profiles_of_before_and_after_are_one(measured: Path) -> None:
    first = json.loads(measured.read_text())
    # Another time the machine is slower.
    second = json.loads(measured.read_text(), parse_float=lambda digits: 1.5 * float(digits))
    both = pooled(first, second)
    for kind in ("whole", "partial", "backward"):
        one, other, joined = (each["answers"][0]["kernels"][kind] for each in (first, second, both))
        for a, b, c in zip(one, other, joined, strict=True):
            assert c == {**a, "seconds": a["seconds"] + b["seconds"]}
    assert both["cluster"] == calibrate.refit(both)["cluster"] != first["cluster"]
    with pytest.raises(ValueError, match="expected the same"):
        pooled(first, {**second, "request": {}})


def test_what_serves_no_plan_is_not_kept() -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        command.run(options("--calibrate", "--ranks", "0"))
    with pytest.raises(ValueError, match="has no unit of a rate"):
        command.run(options("--calibrate", "--network", "200"))
