"""`ds-lvx data check`: what it counts, names and shows."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ds_lvx import cli
from ds_lvx.data import chosen
from ds_lvx.data.frames import Video
from ds_lvx.data.limits import Limits
from tests.data.formats_case import (
    ANSWER,
    OWN_PART,
    STILLS,
    own,
    parts,
    text,
    turns,
    write_media,
)
from tests.data.media import chat, write_image, write_jsonl
from tests.launch.checkpoint_folder import write_checkpoint


def check(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """The command's status, and what it prints."""
    status = cli.main(["data", "check", *map(str, words)])
    said = capsys.readouterr()
    return status, said.out + said.err


def on_terminal(*words: object) -> str:
    """What the command shows where its output is a terminal."""
    ours, theirs = os.openpty()
    with ThreadPoolExecutor(1) as pool, open(ours, "rb", buffering=0) as screen:
        shown = pool.submit(lambda: b"".join(pieces(screen)).decode())
        with open(theirs, "w") as terminal, contextlib.redirect_stdout(terminal):
            cli.main(["data", "check", *map(str, words)])
        return shown.result()


def pieces(screen: Any) -> Iterator[bytes]:
    """Until the other end is closed, which is an error to whoever reads."""
    with contextlib.suppress(OSError):
        while piece := screen.read(4096):
            yield piece


def test_all_that_is_wrong_is_said_in_one_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_media(tmp_path)
    (folder / "text.png").write_text("no picture")
    records = [
        own(),
        own("<image><image>x", images=["a.png", "no.png"]),
        own("<image>x", images=["text.png"]),
        "{",
        own("x"),
        parts(OWN_PART, text()),
        {"prompt": "x"},
        parts(STILLS, text()),
        parts({**STILLS, "video": ["a.png", "no.png"]}, text()),
        parts({**STILLS, "video": ["a.png", "small.png"]}, text()),
    ]
    write_image(folder / "small.png", (30, 40))
    path = write_jsonl(folder / "d.jsonl", *records)
    status, said = check(capsys, path, "--fps", 5)
    assert status == 1
    assert f"{path}: 10 samples, format messages" in said
    assert "4 images, 3 videos (1 of them parts of videos, 1 lists of frames)" in said
    assert "media missing  1 images, 1 videos" in said
    assert "frames         1 to 4 a sample" in said
    assert "would fail     7 samples" in said
    problems = said[said.index("would fail") :]
    for line, problem in ((2, "no such file"), (3, "cannot be decoded"), (4, "got '{'")):
        assert f"{path}:{line}: " in problems
        assert problem in problems
    assert f"{path}:5: got" in problems
    assert f"{path}:7: got the keys ['prompt']" in problems
    assert f"{path}:9: got no such file: {folder}/no.png (messages[0].content[0].video" in problems
    assert "small.png: got a frame of 30 x 40 pixels; expected 50 x 40 as of" in problems
    assert check(capsys, write_jsonl(path, own()), "--decode")[0] == 0
    assert "--format messages" in check(capsys, write_jsonl(path, own(), turns("x")))[1]


def test_tokens_are_shown_with_what_is_learnt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(write_media(tmp_path) / "d.jsonl", own(), own("x" * 900, images=[]))
    plain = check(capsys, path, "--model", "tiny", "--show", 1, "--max_length", 200)[1]
    assert "\x1b" not in plain
    assert f"learnt: {ANSWER}" in plain
    assert f"{path}:1: " in plain
    assert "tokens         " in plain
    assert f"{path}:2: got" in plain
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    coloured = on_terminal(path, "--model", "tiny", "--show", 1)
    assert "\x1b[1;32mR\x1b[0m" in coloured
    assert "\x1b[1;32mW\x1b[0m" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    colourless = on_terminal(path, "--model", "tiny", "--show", 1)
    assert f"learnt: \x1b[0m{ANSWER}" in colourless
    assert "32m" not in colourless
    status, said = check(capsys, path, "--show", 1)
    assert status == 2
    assert "--show: got no --model" in said


@pytest.mark.slow
def test_a_thousand_samples_look_at_a_film_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, probed = write_media(tmp_path), []
    real = chosen.kept_probe

    def probe(path: str, *, limits: Limits) -> Video:
        probed.append(path)
        return real(path, limits=limits)

    monkeypatch.setattr(chosen, "kept_probe", probe)
    path = folder / "d.json"
    path.write_text(json.dumps([turns(image="a.png"), turns("<video>x", video="c.mp4")] * 500))
    status, said = check(capsys, path, "--model", "tiny")
    assert status == 0
    assert "1,000 samples, format llava" in said
    assert "media found    500 images, 500 videos" in said
    assert len(probed) == 1


def test_frames_stand_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(write_media(tmp_path) / "d.jsonl", own())
    status, said = check(capsys, path, "--frames", 3, "--max_frames", 2)
    assert status != 0
    assert "--max_frames: not allowed with --frames" in said


def test_a_template_that_ignores_roles_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "{% for m in messages %}{{ m.content[-1].text }}<|eot_id|>{% endfor %}"
    model = write_checkpoint(tmp_path / "model", template=template)
    data = write_jsonl(tmp_path / "data.jsonl", chat(("text", "Who?"), answer="I"))
    status, said = check(capsys, data, "--model", model)
    assert status == 0
    assert f"warning: --model {model}: the chat template writes what the assistant says" in said


def test_a_name_that_is_no_utf8_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an archive of another system has it."""
    with tarfile.open(
        tmp_path / "s.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1"
    ) as tar:
        found = tarfile.TarInfo("caf\xe9.json")
        found.size = 2
        tar.addfile(found, io.BytesIO(b"{}"))
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, "utf-8", "strict"))
    assert cli.main(["data", "check", str(tmp_path / "s.tar")]) == 1
    assert rb"sample caf\udce9: got the keys []" in printed.getvalue()
