"""Samples looked at before a run: which are bad, what is kept, and processes that end."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_lvx.data.batch import BatchMaker, FrameRate
from ds_lvx.data.chat import Chats, Conversation
from ds_lvx.data.errors import DataError
from ds_lvx.training import check
from ds_lvx.training.check import Checks, bad_samples
from ds_lvx.training.model import Source
from tests.data.media import chat, write_image, write_jsonl, write_png_header, write_video
from tests.ranks import FORKED

RATE = FrameRate(count=2)
# A rank that has nobody to tell.
ALONE: Any = SimpleNamespace(rank=0, size=1, agree=lambda record, _error=None: [record])


def _bad(chats: Chats, level: str = "headers", *, skip: bool = True) -> dict[int, str]:
    checks = Checks(level, "tiny", max_length=300, min_tokens=1, rate=RATE)
    return bad_samples(chats, checks, Source.of("tiny"), world=ALONE, skip=skip)


def _write(folder: Path) -> Chats:
    write_image(folder / "a.png")
    write_video(folder / "a.mp4", frames=8)
    (folder / "text.mp4").write_text("hello")
    (folder / "text.png").write_text("hello")
    write_png_header(folder / "huge.png", 40_000, 25_000)
    write_png_header(folder / "cut.png", 9, 9)  # its pixels are missing
    media = [("image", name) for name in ("a.png", "text.png", "huge.png", "cut.png")]
    media += [("video", name) for name in ("a.mp4", "text.mp4")]
    lines = [chat(pair, ("text", "What?")) for pair in media]
    return Chats(write_jsonl(folder / "d.jsonl", *lines, chat(("text", "x" * 400)), "{", GOOD))


GOOD = chat(("text", "Hi"))


@pytest.mark.parametrize(
    ("level", "expected"),
    [("lines", [7]), ("headers", [1, 2, 5, 6, 7]), ("frames", [1, 2, 3, 5, 6, 7])],
)
def test_each_level_finds_what_it_says(tmp_path: Path, level: str, expected: list[int]) -> None:
    chats = _write(tmp_path)
    bad = _bad(chats, level)
    assert list(bad) == expected
    assert all(text.startswith(f"{tmp_path}/d.jsonl:{n + 1}: ") for n, text in bad.items())
    left = chats.without(bad)
    assert [left[n].source.line - 1 for n in range(len(left))] == [
        n for n in range(9) if n not in bad
    ]


def test_bad_samples_are_all_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)d\.jsonl:2: .*d\.jsonl:3: .*d\.jsonl:8: "):
        _bad(_write(tmp_path), skip=False)
    only_bad = Chats(write_jsonl(tmp_path / "d.jsonl", *["{"] * 30))
    with pytest.raises(ValueError, match=r"no good sample is left: .*(?s:.*)and 10 more"):
        _bad(only_bad)


def test_good_lines_are_looked_at_once_and_bad_ones_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = BatchMaker.sample

    def sample(self: BatchMaker, conversation: Conversation) -> Any:
        seen.append(conversation.source.line)
        return real(self, conversation)

    monkeypatch.setattr(BatchMaker, "sample", sample)
    _bad(_write(tmp_path))
    assert seen == [1, 4, 5, 6, 7, 9]
    seen.clear()
    _bad(Chats(tmp_path / "d.jsonl"))
    assert seen == [6, 7]
    seen.clear()
    write_video(tmp_path / "a.mp4", frames=9)
    _bad(Chats(tmp_path / "d.jsonl"))
    assert seen == [5, 6, 7], "a file that changed is looked at again"
    seen.clear()
    _bad(Chats(tmp_path / "d.jsonl"), "frames")
    assert seen == [1, 4, 5, 6, 7, 9], "what was seen under other settings does not count"


def test_ranks_of_a_node_share_the_lines(tmp_path: Path) -> None:
    """Of 7 lines 3 and 4; what either finds, both know."""
    chats = Chats(write_jsonl(tmp_path / "d.jsonl", *[GOOD] * 6, "{"))
    told: list[dict[str, Any]] = []

    def agree(record: dict[str, Any], _error: Any = None) -> list[dict[str, Any]]:
        told.append(record)
        return [record, record if "host" in record else {"bad": {"1": "d.jsonl:2: bad"}}]

    world: Any = SimpleNamespace(rank=0, size=2, agree=agree)
    checks = Checks("lines", "tiny", max_length=300, min_tokens=1, rate=RATE)
    bad = bad_samples(chats, checks, Source.of("tiny"), world=world, skip=True)
    assert list(told[1]["bad"]) == [6]
    assert list(bad) == [1, 6]


@dataclass(frozen=True)
class Deadly(Checks):
    """The second line is bad, the third ends the process that opens it."""

    def maker(self, source: Source) -> Any:
        return SimpleNamespace(sample=_deadly)


def _deadly(conversation: Conversation) -> None:
    if conversation.source.line == 2:
        raise DataError("bad")
    if conversation.source.line == 3:
        os._exit(7)


@pytest.mark.parametrize(
    "forked",
    [pytest.param(True, marks=pytest.mark.slow), pytest.param(False, marks=pytest.mark.exhaustive)],
)
def test_a_sample_that_ends_its_process_is_named_and_the_rest_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: bool
) -> None:
    chats = Chats(write_jsonl(tmp_path / "d.jsonl", *[GOOD] * 5))
    checks = Deadly("headers", "tiny", max_length=300, min_tokens=1, rate=RATE)
    if forked:  # with what a process imports, which takes it seconds
        monkeypatch.setattr(check, "get_context", lambda _method: FORKED)
    found = check._in_a_process(chats, checks, range(5))
    assert [found[n] for n in (0, 1, 3, 4)] == [None, "bad", None, None]
    assert "d.jsonl:3: got a sample that ends the process which opens it (exit code 7)" in str(
        found[2]
    )

    # Two processes say what one says.
    alone = _bad(_write(tmp_path))
    monkeypatch.setattr(check, "_IN_THIS_PROCESS", 3)
    monkeypatch.setattr(check, "_cores", lambda: 2)
    (tmp_path / ".ds_lvx-checked").rename(tmp_path / "elsewhere")
    assert _bad(Chats(tmp_path / "d.jsonl")) == alone
