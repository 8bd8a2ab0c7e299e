"""Data sets beyond JSON: LLaMA-Factory's, rows of Hugging Face's, shards; parts of videos."""

from __future__ import annotations

import json
import pickle
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pytest
import webdataset

from ds_lvx.data.batch import BatchMaker, FrameRate
from ds_lvx.data.chat import Chats
from ds_lvx.data.errors import DataError
from ds_lvx.data.frames import probe, segment
from ds_lvx.data.order import SampleOrder
from ds_lvx.data.text import TextEncoder
from ds_lvx.training.model import Source
from tests.data.formats_case import (
    ANSWER,
    ASKED,
    OWN_PART,
    VIDEO,
    expected,
    own,
    parts,
    said,
    text,
    turns,
    write_media,
)
from tests.data.media import write_jsonl


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_media(tmp_path)


def info(folder: Path, **entries: Any) -> Path:
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    return folder / "dataset_info.json"


@pytest.mark.parametrize(
    ("entry", "record"),
    [
        ({"formatting": "sharegpt", "columns": {"images": "pictures"}}, turns(pictures=["a.png"])),
        (
            {
                "formatting": "sharegpt",
                "columns": {"messages": "chat", "images": "image"},
                "tags": {
                    "role_tag": "who",
                    "content_tag": "what",
                    "user_tag": "me",
                    "assistant_tag": "it",
                },
            },
            {
                "chat": [{"who": "me", "what": f"<image>{ASKED}"}, {"who": "it", "what": ANSWER}],
                "image": ["a.png"],
            },
        ),
        ({"formatting": "openai"}, own()),
        ({}, {"instruction": f"<image>{ASKED}", "output": ANSWER, "images": ["a.png"]}),
        (
            {"columns": {"prompt": "q", "response": "a", "images": "images"}},
            {"q": ASKED, "a": ANSWER, "images": ["a.png"]},
        ),
    ],
)
def test_dataset_info_says_what_columns_mean(folder: Path, entry: Any, record: Any) -> None:
    write_jsonl(folder / "d.json", [record])
    path = info(folder, mine={"file_name": "d.json", **entry})
    same = expected(folder, own())
    assert said(Chats(path)) == said(Chats(f"{path}:mine")) == said(Chats(folder)) == same
    assert Chats(path).format == "dataset_info"
    with pytest.raises(DataError, match=r"--format: got llava for .*name the file itself"):
        Chats(path, format="llava")


@pytest.mark.parametrize("formatting", ["sharegpt", "alpaca"])
def test_errors_have_the_columns_of_dataset_info(folder: Path, formatting: str) -> None:
    columns = {"images": "pictures", "prompt": "q", "response": "a", "messages": "chat"}
    path = info(folder, mine={"file_name": "d.json", "formatting": formatting, "columns": columns})
    is_chat = formatting == "sharegpt"
    asked = {"chat": turns()["conversations"], "q": f"<image>{ASKED}", "a": ANSWER}
    for pictures, problem in (
        (["no.png"], r"/no\.png \(pictures\[0\]\); expected"),
        ([], rf'<image> in {r"chat.0." if is_chat else "q"} and no image left .* in "pictures"'),
        (["a.png", "b.png"], r"b\.png' in pictures\[1\] without a <image>"),
    ):
        write_jsonl(folder / "d.json", [{**asked, "pictures": pictures}])
        with pytest.raises(DataError, match=problem):
            Chats(path)[0]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"hf_hub_url": "a/b"}, "got hf_hub_url 'a/b'.*download the data set"),
        ({"file_name": "d.json", "ranking": True}, "preferences are not learnt"),
        ({"file_name": "d.json", "columns": {"picture": "x"}}, "got the key 'picture'"),
        ({"file_name": "d.json", "formatting": "csv"}, "got formatting 'csv'"),
        ({"file_name": "d.json", "num_samples": 3}, "got the key 'num_samples'"),
        ({"file_name": "d.json", "columns": {"prompt": ["x"]}}, "for 'columns'; expected names"),
        ({"file_name": "no.json"}, r"no\.json: got no such file"),
        ({"file_name": "d.json", "columns": {"response": "a"}}, "expected the column 'a'"),
    ],
)
def test_mistakes_in_dataset_info_are_named(folder: Path, entry: Any, problem: str) -> None:
    write_jsonl(folder / "d.json", {"instruction": "x", "output": "y"})
    with pytest.raises(DataError, match=problem):
        Chats(info(folder, mine=entry))[0]
    with pytest.raises(DataError, match=r"got no data set 'her'; expected one of \['mine'\]"):
        Chats(f"{info(folder, mine=entry)}:her")
    with pytest.raises(DataError, match=r"no name of a data set.*dataset_info\.json:mine"):
        Chats(info(folder, mine=entry, her=entry))


def rows(folder: Path) -> datasets.Dataset:
    """Bytes, a path, and a list of both beside a chat."""
    picture = {"bytes": (folder / "a.png").read_bytes(), "path": None}
    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "images": datasets.List(datasets.Image()),
        }
    )
    asked = own("<image><image>x")["messages"]
    first = {"messages": asked, "images": [picture, {"path": str(folder / "b.png")}]}
    second = {"messages": own("x")["messages"], "images": None}
    return datasets.Dataset.from_list([first, second], features=features)


def test_rows_of_hugging_face_data_sets_are_read(folder: Path) -> None:
    found = rows(folder)
    found.save_to_disk(str(folder / "saved"))
    found.to_parquet(str(folder / "d.parquet"))
    (folder / "tables").mkdir()
    found.to_parquet(str(folder / "tables" / "train-0.parquet"))
    arrow = next((folder / "saved").glob("*.arrow"))
    same = expected(folder, own("<image><image>x", images=["a.png", "b.png"]), own("x", images=[]))
    for path in (folder / "saved", folder / "d.parquet", folder / "tables", arrow):
        chats = Chats(path)
        assert said(chats) == same
        assert said(pickle.loads(pickle.dumps(chats))) == same
        assert str(chats[1].source) == f"{path}, row 1"
        assert chats.lines.sha256 == Chats(path).lines.sha256
    plain = [(folder / name).read_bytes() for name in ("a.png", "b.png")]
    record = {"messages": own("<image><image>x")["messages"], "images": plain}
    datasets.Dataset.from_list([record]).to_parquet(str(folder / "plain.parquet"))
    assert said(Chats(folder / "plain.parquet")) == same[:1]
    datasets.DatasetDict(train=found).save_to_disk(str(folder / "splits"))
    with pytest.raises(DataError, match=r"got several splits: train; .*splits/train"):
        Chats(folder / "splits")
    (folder / "no.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"no\.parquet: got a data set that cannot be read"):
        Chats(folder / "no.parquet")


def test_without_datasets_its_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows(folder).to_parquet(str(folder / "d.parquet"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"no package `datasets`.*pip install 'ds_lvx\[data\]'"):
        Chats(folder / "d.parquet")


def write_shards(folder: Path, counts: tuple[int, ...] = (3, 2)) -> Path:
    (folder / "shards").mkdir()
    number = 0
    for shard, count in enumerate(counts):
        with webdataset.TarWriter(str(folder / "shards" / f"{shard:03d}.tar")) as writer:
            for _ in range(count):
                writer.write(
                    {
                        "__key__": f"s{number:04d}",
                        "jpg": (folder / "a.png").read_bytes(),
                        "json": own(f"<image>{number}", images=["jpg"]),
                    }
                )
                number += 1
    return folder / "shards"


def test_shards_are_read_as_webdataset_wrote_them(folder: Path) -> None:
    path = write_shards(folder)
    same = expected(folder, *(own(f"<image>{n}") for n in range(5)))
    for each in (path, path / "{000..001}.tar"):
        chats = Chats(each)
        assert said(chats) == said(pickle.loads(pickle.dumps(chats))) == same
    assert str(chats[3].source) == f"{path}/001.tar, sample s0003"
    assert chats.blocks == (3, 2)
    assert chats.without([0, 3]).blocks == (2, 1)
    order = SampleOrder(5, seed=3, blocks=chats.blocks)
    epochs = [[order.sample(place) for place in range(first, first + 5)] for first in (0, 5, 10)]
    assert all(sorted(epoch) == [*range(5)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert all({*epoch[:3]} == {0, 1, 2} or {*epoch[:2]} == {3, 4} for epoch in epochs)


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
    return path


def test_samples_of_shards_take_their_files(folder: Path) -> None:
    png, film = ((folder / name).read_bytes() for name in ("a.png", "c.mp4"))
    chat = json.dumps(own("<image>x", images=[])).encode()
    two = json.dumps(turns("<image><image>x", images=["d/c.0.png", "c.1.png"])).encode()
    name = "d/" + 60 * "long/" + "e"
    path = write_tar(
        folder / "d.tar",
        {
            "a.json": chat,
            "a.png": png,
            "a.cls": b"3",
            "b.mp4": film,
            "b.txt": b"Red.\n",
            "d/c.0.png": png,
            "d/c.1.png": png,
            "d/c.json": two,
            f"{name}.png": png,
            f"{name}.json": chat,
        },
    )
    one = own("<image>x")
    captioned = parts(VIDEO)
    chats = Chats(path, format="messages").without([2])
    assert said(chats) == expected(folder, one, captioned, one)
    assert chats.media(1) == [("video", True)]
    both = own("<image><image>x", images=["a.png"] * 2)
    assert said(Chats(path, format="sharegpt").without([0, 3])) == expected(folder, captioned, both)
    film_chat = chats[1]
    encoder = TextEncoder(Source.of("tiny").processor, 400, family=Source.of("tiny").family)
    maker = BatchMaker(encoder, FrameRate(count=3), owned=range)
    maker.decode(maker.sample(film_chat))


@pytest.mark.parametrize("beside", [{}, {"b.json": turns("<image>x")}, {"b.json": own("<image>x")}])
def test_captions_stand_beside_chats_of_any_format(folder: Path, beside: Any) -> None:
    png = (folder / "a.png").read_bytes()
    chats_of = {name: json.dumps({**chat, "images": []}).encode() for name, chat in beside.items()}
    files = {"a.txt": b"Red.", "a.0.png": png, "a.1.png": png, **chats_of}
    chats = Chats(write_tar(folder / "d.tar", {**files, **({"b.png": png} if beside else {})}))
    captioned = own("<image><image>", images=["a.png"] * 2)
    assert said(chats) == expected(folder, captioned, *[own("<image>x")] * len(beside))


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"a.png": b""}, r"d\.tar, sample a: got the files \['png'\]; expected one that ends"),
        ({"a.json": b"{"}, r"d\.tar, sample a: got '\{'"),
        (
            {"a.json": json.dumps(own(images=["b.png"])).encode(), "a.b.png": b"", "a.c.png": b""},
            r"got the files \['a\.c\.png'\] that the record does not name",
        ),
        ({"README": b"x"}, r"d\.tar: got no sample in the shards"),
    ],
)
def test_mistakes_in_shards_are_named(folder: Path, files: dict[str, bytes], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        Chats(write_tar(folder / "d.tar", files))[0]
    whole = write_tar(folder / "d.tar", {"a.json": b"{}", "a.png": 9999 * b"x"}).read_bytes()
    for wrong in (whole[:5000], b"no tar"):
        (folder / "d.tar").write_bytes(wrong)
        with pytest.raises(DataError, match=r"d\.tar: got a shard that cannot be read"):
            Chats(folder / "d.tar")
    for other, cure in (("d.tar.gz", "unpack it to"), ("s3://a/b.tar", "download it first")):
        with pytest.raises(DataError, match=cure):
            Chats(other)


def test_a_part_of_a_video_is_a_film_of_its_own(folder: Path) -> None:
    video = probe(str(folder / "c.mp4"))  # 40 frames, 25 a second
    assert segment(video, None, None) == segment(video, 0, 1.6) == range(40)
    assert segment(video, 0.4, 1.2) == range(10, 30)
    assert segment(video, 0.41, 1.21) == range(10, 31)
    for start, end in ((1.7, None), (0.5, 0.5), (0, 9)):
        with pytest.raises(ValueError, match=r"c\.mp4: got the part from .* of a video of 1\.60 s"):
            segment(video, start, end)
    source = Source.of("tiny")
    encoder = TextEncoder(source.processor, 400, family=source.family)
    maker = BatchMaker(encoder, FrameRate(fps=5), owned=range)
    record = parts({**OWN_PART, "fps": 5}, text())
    [frames] = maker.sample(Chats(write_jsonl(folder / "d.jsonl", record))[0]).frames
    assert frames.indices == (10, 15, 20, 25)
    assert frames.times == pytest.approx([0, 0.2, 0.4, 0.6])
