"""The kernel benchmark's script and `launch/gpu.sh`: what they write, refuse and committed."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_kernels
import bench_memory
from bench.kernels import report as kernels_report
from bench.kernels.cases import MEASURED
from ds_lvx import cli
from ds_lvx.compare import command
from tests.kernels.test_ahead_of_time import most_spilled

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENT = ROOT / "docs" / "kernels.md"
BENCHMARKS = ROOT / "docs" / "benchmarks"
EMPTY = "".join(
    f"<!-- bench_kernels.py, {part}: begin -->\n<!-- bench_kernels.py, {part}: end -->\n"
    for part in bench_kernels.PARTS
)
GPU = torch.cuda.is_available()

# Stands for Python on a machine with a GPU, on which the memory benchmark fails.
PRETENDS = """#!/bin/bash
if [ "$1" = - ] && [ "$#" -gt 1 ]; then exec {python} "$@"; fi
echo "$@" >>{log}
[ "$2" != --parts ] || [ "$3" != memory ]
"""


def bench(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Run the script in this process."""
    monkeypatch.setattr(sys, "argv", ["launch/bench_kernels.py", *words])
    bench_kernels.main()


@pytest.mark.slow
def test_quick_run_writes_json_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, document = tmp_path / "kernels.json", tmp_path / "kernels.md"
    document.write_text(EMPTY)
    words = ("--device", "cpu", "--quick", "--output", str(output), "--document", str(document))
    bench(monkeypatch, *words, "--only", "tiny-24*/native/*", "tiny-24*/sdpa-*", "*/auto/forward")
    results = json.loads(output.read_text())
    assert (results["kind"], results["device"]) == ("measured", "cpu")
    assert results["versions"]["torch"] == torch.__version__
    assert results["rates"]["matrix_flops"] > 0
    status = {record["name"]: record["status"] for record in results["records"]}
    assert len(status) == 2 * 2 * (1 + 4) + 5
    assert status["tiny-24-visibility/native/backward"] == "ok"
    assert status["tiny-24/sdpa-cudnn/forward"] == "failed"
    assert kernels_report.measured_table(results) in document.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cpu", "--repeats", "0"], "--repeats: got 0; expected more than 0"),
        (["--device", "cpu", "--only", "x/*"], "--only: got 'x/*', which matches nothing"),
        (["--render"], "--render: got no --document"),
        (["--compile", "--floors"], "not allowed with argument"),
    ],
)
def test_bad_options_are_named(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench(monkeypatch, *words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        bench(monkeypatch)
    assert "PyTorch sees no GPU" in capsys.readouterr().err


def test_committed_floors_are_those_of_the_formulas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench(monkeypatch, "--floors", "--output", str(tmp_path / "kernels.json"))
    fresh, committed = (
        json.loads((folder / "kernels-floors.json").read_text())
        for folder in (tmp_path, BENCHMARKS)
    )
    assert fresh["kind"] == committed["kind"] == "predicted"
    assert len(committed["records"]) == 2 * len(MEASURED)
    assert committed["records"] == fresh["records"]


def test_the_documents_tables_are_those_of_the_committed_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "kernels.md"
    document.write_text(DOCUMENT.read_text())
    bench(monkeypatch, "--render", "--document", str(document))
    assert document.read_text() == DOCUMENT.read_text()


def test_committed_compiled_kernels_spill_as_little_as_measured() -> None:
    compiled = json.loads((BENCHMARKS / "kernels-compiled.json").read_text())
    assert compiled["kind"] == "measured"
    assert {record["capability"] for record in compiled["records"]} == {80, 90, 100}
    for each in compiled["records"]:
        assert each["spilled_bytes"] <= most_spilled(each)
        assert each["shared_bytes"] <= each["most_shared_bytes"]
        assert each["programs_per_multiprocessor"] >= 1


def gpu_script(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "launch" / "gpu.sh"), *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("gpus", "minutes"), [(1, 8), (4, 10)])
def test_dry_run_prints_commands_of_few_minutes(gpus: int, minutes: int, tmp_path: Path) -> None:
    (tmp_path / "a.whl").touch()
    folder = tmp_path / "results"
    asked = ("--gpus", str(gpus), "--wheels", str(tmp_path), str(folder))
    done = gpu_script("--dry-run", *asked)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    limits = [re.match(r"timeout -s INT -k (\d+) (\d+) ", line) for line in lines]
    assert all(limits), done.stdout
    checks_s = 20
    limits_s = sum(int(number) for limit in limits if limit for number in limit.groups())
    assert limits_s + checks_s < minutes * 60
    parts = {
        1: ("a.whl", "-m gpu", "bench_kernels.py", "--parts memory", "--parts step_time"),
        4: (
            *("a.whl", "-m gpus", "DS_ACCELERATOR=cuda", "doctor", "184576", "512K", "--recompute"),
            "--parts step_time --ranks 4",
        ),
    }
    for line, word in zip(lines, parts[gpus], strict=True):
        assert word in line
    if gpus == 1:
        tests = [word for word in lines[1].split() if word.startswith("tests/")]
        assert tests[0] == "tests/kernels/test_gpu.py"
    assert not folder.exists()


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_the_benchmarks_know_the_options_of_the_gpu_script(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And ds-lvx those of its own."""
    scripts = {"bench_kernels.py": bench_kernels, "bench_memory.py": bench_memory}
    found = []
    lines = [
        gpu_script("--dry-run", "--gpus", gpus, "out").stdout.splitlines() for gpus in ("1", "4")
    ]
    for line in itertools.chain(*lines):
        words = shlex.split(line)
        for number, word in enumerate(words):
            name = word.rpartition("/")[2]
            if name == "ds_lvx.cli":
                found.append(words[number + 1])
                parser = argparse.ArgumentParser()
                import_module(cli.COMMANDS[found[-1]][0]).add_arguments(parser)
                asked = parser.parse_args(words[number + 2 :])
                if found[-1] == "compare":
                    asked.device = "cpu"
                    command.settle_measurement(asked)
                    assert command.contest_of(asked, 4)[1] == {}
            if name in scripts:
                there = ["--device", "cpu"] if name == "bench_kernels.py" else []
                monkeypatch.setattr(sys, "argv", [*words[number:], *there])
                scripts[name].parse_options()
                found.append(name)
    one = ["bench_kernels.py", "bench_memory.py", "bench_memory.py"]
    assert found == [*one, "doctor", *["compare"] * 3, "bench_memory.py"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--wheels"], "--wheels: got no folder"),
        (["--wheels", "/nowhere"], "--wheels: got /nowhere, which holds no *.whl"),
        (["--gpus"], "--gpus: got '', expected 1 or more"),
        (["--gpus", "two"], "--gpus: got 'two', expected 1 or more"),
        (["--fast"], "got the unknown option --fast"),
        (["a", "b"], "got two output folders, a and b"),
    ],
)
def test_gpu_script_refuses_what_it_does_not_know(words: list[str], said: str) -> None:
    done = gpu_script(*words)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.slow
def test_gpu_script_without_a_gpu_says_so(tmp_path: Path) -> None:
    done = gpu_script(str(tmp_path), PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "launch/gpu.sh: no GPU: torch.cuda.is_available() is False" in done.stderr
    assert not list(tmp_path.iterdir())


def test_gpu_script_goes_on_behind_a_failure_and_ends_with_an_error(tmp_path: Path) -> None:
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(PRETENDS.format(python=sys.executable, log=log))
    python.chmod(0o755)
    done = gpu_script(str(tmp_path / "results"), PYTHON=str(python))
    assert done.returncode == 1
    assert "memory FAILED: exit code 1" in done.stderr
    assert "1 failed" in done.stderr
    assert "step_time" in log.read_text().splitlines()[-1]
    steps = json.loads((tmp_path / "results" / "gpu.json").read_text())["steps"]
    assert [(step["step"], step["exit_code"]) for step in steps] == [
        ("tests", 0),
        ("kernels", 0),
        ("memory", 1),
        ("step_time", 0),
    ]
