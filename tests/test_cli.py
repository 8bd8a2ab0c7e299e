"""The command ds-lvx: its subcommands, and how it ends."""

from __future__ import annotations

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


@pytest.mark.parametrize("kind", [ValueError, NotImplementedError])
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
