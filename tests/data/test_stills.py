"""A video as a list of its frames is the video; a rank opens its own frames alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ds_lvx.data import chosen as chosen_media
from ds_lvx.data.batch import BatchMaker, FrameRate
from ds_lvx.data.chat import read_conversations
from ds_lvx.data.chosen import Chooser, Frames
from ds_lvx.data.conversation import Part
from ds_lvx.data.errors import DataError
from ds_lvx.data.frames import decode, probe
from ds_lvx.data.held import Stills
from ds_lvx.data.images import load_image
from ds_lvx.data.text import TextEncoder
from ds_lvx.models import FAMILIES
from ds_lvx.training.model import Source
from tests.data.media import chat, write_image, write_jsonl, write_video

TINY = ("mllama", "qwen3_vl", "qwen2_5_vl")
TAKEN = range(0, 40, 5)  # at 5 a second of 25
FPS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film, and frames of it as files."""
    folder = tmp_path_factory.mktemp("stills")
    video = probe(str(write_video(folder / "a.mp4")))
    for number, picture in zip(TAKEN, decode(video, TAKEN), strict=True):
        picture.save(folder / f"{number}.png")
    return folder


def files() -> list[str]:
    return [f"{number}.png" for number in TAKEN]


def maker(name: str, rate: FrameRate, owned: Any = range) -> BatchMaker:
    source = Source.of(f"tiny:{name}")
    encoder = TextEncoder(source.processor, source.max_length(None), family=source.family)
    deal = None if owned is range else lambda tokens: owned(len(tokens))
    return BatchMaker(encoder, rate, owned=owned, deal=deal)


def conversation(folder: Path, video: Any, **more: Any) -> Any:
    record = chat(("video", video), ("text", "What?"))
    record["messages"][0]["content"][0] |= more
    return read_conversations(write_jsonl(folder / "d.jsonl", record))[0]


@pytest.mark.parametrize("name", [name for name in TINY if name in FAMILIES])
def test_frames_in_files_make_the_batch_of_their_film(folder: Path, name: str) -> None:
    for rate, part in (
        (FrameRate(fps=1), {"sample_fps": FPS}),
        (FrameRate(fps=1), {"fps": FPS, "video_start": 0.4, "video_end": 1.2}),
        (FrameRate(fps=FPS, max_frames=3), {"sample_fps": FPS}),
    ):
        film = {key: value for key, value in part.items() if key != "sample_fps"}
        whole = conversation(folder, "a.mp4", **{**film, "fps": FPS})
        expected = maker(name, FrameRate(fps=FPS, max_frames=rate.max_frames)).batch([whole])
        found = maker(name, rate).batch([conversation(folder, files(), **part)])
        assert found.num_frames == expected.num_frames > 1
        assert found.inputs.keys() == expected.inputs.keys()
        for key, value in expected.inputs.items():
            torch.testing.assert_close(found.inputs[key], value, rtol=0, atol=0, msg=key)


def chosen(rate: FrameRate, **said: Any) -> Frames:
    part = Part("video", "x", held=Stills(tuple(files()), fps=FPS), **said)
    return Chooser(rate).frames(part)


def test_all_frames_of_a_list_are_taken_unless_fewer_are_asked_for() -> None:
    assert chosen(FrameRate(fps=1)).indices == tuple(range(8))
    assert chosen(FrameRate(fps=1)).times == [n / FPS for n in range(8)]
    assert chosen(FrameRate(count=2)).indices == chosen(FrameRate(), nframes=2).indices == (2, 6)
    assert chosen(FrameRate(fps=1, max_frames=2)).indices == (2, 6)
    assert chosen(FrameRate(count=20)).indices == tuple(range(8))
    assert chosen(FrameRate(fps=1), start=0.4, end=1.0).indices == (2, 3, 4)
    with pytest.raises(ValueError, match=r"0.png and 7 more frames: got the part from 2 s"):
        chosen(FrameRate(fps=1), start=2.0)
    assert Stills(("a",)).fps == 2


@pytest.mark.parametrize("name", TINY)
def test_a_rank_opens_its_own_frames_alone(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in files():
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    asked = conversation(tmp_path, files(), sample_fps=FPS)
    units = {"mllama": range(2, 5), "qwen3_vl": range(1, 2), "qwen2_5_vl": range(1, 2)}[name]
    frames = range(2, 5) if name == "mllama" else range(2, 4)
    mine = maker(name, FrameRate(fps=1), owned=lambda count: units)
    mine.sample(asked)
    assert mine.counter.frames == 0
    opened: list[str] = []

    def load(path: str, **limits: Any) -> Any:
        opened.append(Path(path).name)
        return load_image(path, **limits)

    monkeypatch.setattr(chosen_media, "load_image", load)
    made = mine.batch([asked])
    assert opened == [files()[number] for number in frames]
    assert mine.counter.frames == len(frames)
    assert made.num_frames == 8
    (tmp_path / files()[frames[0]]).write_bytes(b"no picture")
    anew = maker(name, FrameRate(fps=1), owned=lambda count: units)
    with pytest.raises(DataError, match=rf"d\.jsonl:1: .*{files()[frames[0]]}: got a file that"):
        anew.batch([asked])


def test_frames_of_several_sizes_are_refused_where_sizes_count(
    folder: Path, tmp_path: Path
) -> None:
    write_image(tmp_path / "a.png", (64, 48))
    write_image(tmp_path / "b.png", (48, 64))
    asked = conversation(tmp_path, ["a.png", "b.png"])
    with pytest.raises(DataError, match=r"d\.jsonl:1: .*b\.png: got a frame of 48 x 64 pixels"):
        maker("qwen3_vl", FrameRate(fps=1)).sample(asked)
    assert maker("mllama", FrameRate(fps=1)).sample(asked).num_frames == 2
