"""The command ds-lvx: its subcommands, and how it ends."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from ds_lvx import cli

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_subcommand_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: ds-lvx {name}" in capsys.readouterr().out


def test_help_lists_the_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, (_, line) in cli.COMMANDS.items():
        assert f" {name} " in text
        assert line in text


@pytest.mark.parametrize("words", [[], ["doktor"]])
def test_an_unknown_subcommand_names_the_known(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "required: COMMAND" in error or "'doctor'" in error or "choose from doctor" in error


@pytest.mark.parametrize("kind", [ValueError, NotImplementedError, OSError])
def test_a_mistake_of_the_user_is_one_line_and_status_2(
    kind: type[Exception], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(options: object) -> int:
        raise kind("card: got 'A1000'; expected one of ['A100-40']")

    module = SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    assert cli.main(["doctor"]) == 2
    error = capsys.readouterr().err
    assert error == "ds-lvx doctor: card: got 'A1000'; expected one of ['A100-40']\n"


def test_a_status_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(add_arguments=lambda parser: None, run=lambda options: 3)
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    assert cli.main(["doctor"]) == 3


def test_the_console_script_is_this_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["ds-lvx"].partition(":")
    assert getattr(import_module(module), function) is cli.main


PLAN = "plan --model Llama-3.2-11B-Vision --text 384 --frames 120 --gpus 16 --card H100"


@pytest.mark.parametrize("words", ["--help", PLAN, f"{PLAN} --json"], ids=["help", "plan", "json"])
def test_what_computes_nothing_does_not_import_what_computes(words: str) -> None:
    """Seconds of imports, for a text that is there at once without them."""
    script = (
        "import sys\n"
        "from ds_lvx.cli import main\n"
        "try:\n"
        "    status = main(sys.argv[1:])\n"
        "except SystemExit as ended:\n"
        "    status = ended.code\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'{status} {heavy}' if status or heavy else 0)\n"
    )
    command = [sys.executable, "-c", script, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ds-lvx" in done.stdout or "Llama" in done.stdout


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_has_enough_ends_it_without_a_traceback(
    buffered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``ds-lvx plan ... | head``, also with PYTHONUNBUFFERED."""
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "wb", buffering=-1 if buffered else 0) as file:
        pipe = io.TextIOWrapper(file, write_through=not buffered)
        monkeypatch.setattr(sys, "stdout", pipe)
        words = ["plan", "--model", "Qwen-VL", "--text", "64", "--frames", "1", "--gpus", "4"]
        assert cli.main([*words, "--card", "H100"]) == 1
