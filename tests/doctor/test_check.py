"""The self-check and the whole report, on real processes and on answers that are made up."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ds_lvx import cli
from ds_lvx.compare.harness import Ranks, RunError
from ds_lvx.doctor import check, command, network, rank
from ds_lvx.doctor.findings import Finding, Section, State
from ds_lvx.doctor.rank import METHODS, RESULTS, Case
from ds_lvx.kernels.native import NativeKernel
from tests.forked import fork_fresh_ranks

TITLES = ("Versions", "Devices", "Communication", "Kernels", "System", "Measured", "Self-check")


def answers(
    wrong: Callable[[int, int, dict[str, Any]], dict[str, Any]] = lambda ranks, rank, case: case,
) -> Callable[..., list[list[dict[str, Any]]]]:
    """An `on_ranks` whose ranks are all right, but for what ``wrong`` makes of a case."""

    def run(function: Any, request: dict[str, Any], ranks: Ranks) -> Any:
        def of(rank: int) -> list[dict[str, Any]]:
            cases = Case.all(request["kernels"])
            right = {"errors": dict.fromkeys(RESULTS, 1e-8), "problem": ""}
            return [wrong(ranks.count, rank, {**vars(case), **right}) for case in cases]

        return [of(rank) for rank in range(ranks.count)]

    return run


def checked(*, blocked: str = "") -> list[Section]:
    found = check.sections("cpu", timeout_s=60, blocked=blocked, tell=lambda line: None)
    return list(found)


def bad(section: Section) -> list[Finding]:
    return [finding for finding in section.findings if finding.state is State.ERROR]


@pytest.mark.slow
def test_the_report_has_every_part_and_attention_is_exact(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real ranks, 1 and 2."""
    fork_fresh_ranks(monkeypatch)
    assert cli.main(["doctor", "--timeout", "900"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{title}" in f"\n{text}" for title in TITLES)
    assert "\x1b" not in text
    gpus = torch.cuda.device_count() if network.device_kind() == "cuda" else 0
    for ranks, name in ((1, "1 rank "), (2, "2 ranks ")):
        part = text.partition(f"\nSelf-check on {name}")[2].partition("\n\n")[0]
        lines = [line for line in part.splitlines() if "at most" in line]
        kernels = check.kernels_of("cuda" if gpus >= ranks else "cpu")
        assert len(lines) == len(METHODS) * len(kernels)
        assert all(line.startswith("  ok") for line in lines)
    assert "attention is exact on 1 and on 2 ranks" in text


def test_a_kernel_that_is_wrong_in_backward_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank, in this process, with a kernel whose dk is off by one percent."""
    backward = NativeKernel.backward

    def wrong(self: NativeKernel, *tensors: Any, **options: Any) -> Any:
        dq, dk, dv = backward(self, *tensors, **options)
        return dq, dk * 1.01, dv

    monkeypatch.setattr(NativeKernel, "backward", wrong)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(check, "on_ranks", lambda function, request, _: [function(request)])
    assert cli.main(["doctor", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    *_, alone, together = record["sections"]
    assert len(alone["findings"]) == len(METHODS)
    for finding in alone["findings"]:
        assert finding["state"] == "error"
        assert "fp32, all keys visible: dk on rank 0 is off by 1.0e-02" in finding["value"]
        errors = finding["facts"]["cases"][0]["errors"]
        assert max(errors["out"], errors["dq"], errors["dv"]) < 1e-5
    assert together["findings"][0]["value"] == "not run: no kernel is right on 1 rank"


def test_a_kernel_that_raises_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: NativeKernel, *tensors: Any, **options: Any) -> Any:
        raise RuntimeError("no kernel image\nand more lines")

    monkeypatch.setattr(NativeKernel, "forward", fail)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    cases = rank.check({"device": "cpu", "kernels": ["auto", "reference"], "timeout_s": 1})
    problems = {case["kernel"]: case["problem"] for case in cases}
    assert problems == {"auto": "RuntimeError: no kernel image", "reference": ""}
    # With other ranks waiting, it ends the process, and the last line says where.
    case = Case("ring", "native", "bfloat16", True)
    with pytest.raises(SystemExit) as ended:
        rank._run(case, torch.device("cpu"), ranks=2, rank=0)
    assert ended.value.code == (
        "ring, kernel native, bfloat16, some keys visible: RuntimeError: no kernel image"
    )


def test_json_parses_and_has_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor", "--json", "--no-check"])
    record = json.loads(capsys.readouterr().out)
    assert status == (1 if record["errors"] else 0)
    titles = [section["title"] for section in record["sections"]]
    assert all(any(title.startswith(name) for title in titles) for name in TITLES[:-1])
    states = [finding["state"] for part in record["sections"] for finding in part["findings"]]
    assert (states.count("error"), states.count("warning")) == (
        record["errors"],
        record["warnings"],
    )


def test_an_interface_that_does_not_exist_is_a_finding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nonexistent")
    monkeypatch.setattr(check, "on_ranks", answers())
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "FAIL  gloo takes" in text
    assert "there is no interface 'nonexistent'" in text
    assert "-> unset GLOO_SOCKET_IFNAME, or set it to one of" in text
    assert "warn  2 ranks  not run: communication cannot work here" in text
    assert "Traceback" not in text


def test_what_is_right_alone_and_wrong_together_is_the_communication(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(ranks: int, rank: int, case: dict[str, Any]) -> dict[str, Any]:
        if (ranks, rank, case["method"], case["dtype"]) == (2, 1, "lvx gather", "bfloat16"):
            return {**case, "errors": {**case["errors"], "dv": 0.3}}
        return case

    monkeypatch.setattr(check, "on_ranks", answers(wrong))
    alone, together = checked()
    assert not bad(alone)
    (fault,) = bad(together)
    assert fault.name == "lvx gather, kernel auto"
    assert fault.value == (
        "bf16, all keys visible: dv on rank 1 is off by 3.0e-01, where 2e-02 is allowed"
    )
    assert fault.advice.startswith("on 1 rank it is right, so look at the communication")


def test_a_kernel_that_fails_alone_is_left_out_on_two_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[str]] = []

    def wrong(ranks: int, rank: int, case: dict[str, Any]) -> dict[str, Any]:
        failed = case["kernel"] == "triton"
        return {**case, "errors": {}, "problem": "RuntimeError: no such thing"} if failed else case

    def run(function: Any, request: dict[str, Any], ranks: Ranks) -> Any:
        asked.append(request["kernels"])
        return answers(wrong)(function, request, ranks)

    monkeypatch.setattr(check, "on_ranks", run)
    monkeypatch.setattr(check, "kernels_of", lambda device: ["native", "triton"])
    alone, together = checked()
    assert asked == [["native", "triton"], ["native"]]
    assert {finding.name for finding in bad(alone)} == {f"{m}, kernel triton" for m in METHODS}
    assert "RuntimeError: no such thing on rank 0" in bad(alone)[0].value
    assert '"kernel": "native"' in bad(alone)[0].advice
    assert not bad(together)


def test_ranks_that_hang_or_die_are_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: Any) -> Any:
        raise RunError("rank 0 was not done after 60 s; the end of its output:\nfirst\nchecking x")

    monkeypatch.setattr(check, "on_ranks", run)
    for section, name in zip(checked(), ("1 rank", "2 ranks"), strict=True):
        (fault,) = bad(section)
        assert (fault.name, fault.details[-1]) == (name, "checking x")
        assert fault.value == "rank 0 was not done after 60 s"
        assert "--timeout" in fault.advice


def test_a_part_that_raises_does_not_hide_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> list[Finding]:
        raise OSError("no such file")

    monkeypatch.setattr("ds_lvx.doctor.devices.findings", fail)
    options = argparse.Namespace(json=False, no_check=True, timeout=1.0, tune=False, config=None)
    assert command.run(options) == 1
    text = capsys.readouterr().out
    assert "FAIL  Devices  could not be looked at: OSError: no such file" in text
    assert "\nSystem\n" in text


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_a_time_out_is_positive(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--timeout", seconds]) == 2
    assert "expected seconds above 0" in capsys.readouterr().err
