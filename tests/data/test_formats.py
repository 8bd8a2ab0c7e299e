"""Every format says what our own form of the same sample says, and its usual mistakes are named."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from ds_lvx.data.chat import Chats
from ds_lvx.data.errors import DataError
from ds_lvx.data.images import load_image
from tests.data.formats_case import (
    ANSWER,
    ASKED,
    FRAMES,
    IMAGE,
    OWN_PART,
    PART,
    STILLS,
    VIDEO,
    data_url,
    expected,
    own,
    parts,
    said,
    text,
    turns,
    url,
    write_media,
)
from tests.data.media import write_jsonl

WHO = [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": "Me."}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_media(tmp_path)


@pytest.mark.parametrize(
    ("name", "record", "same"),
    [
        ("openai", parts(url("a.png"), text()), own()),
        ("openai", parts(url("c.mp4", "video_url"), text()), parts(VIDEO, text())),
        ("openai", parts({"type": "image_url", "image_url": "a.png"}, text()), own()),
        ("llava", turns(image="a.png"), own()),
        (
            "llava",
            turns("<image>\n<image>x", image=["a.png", "b.png"]),
            own("<image>\n<image>x", images=["a.png", "b.png"]),
        ),
        ("llava", turns("<video>x", video="c.mp4"), own("<video>x", videos=["c.mp4"])),
        ("llava", turns("<image>x", video="c.mp4"), own("<video>x", videos=["c.mp4"])),
        ("llava", turns("<video>x", video="c.mp4", start=0.4, end=1.2), parts(OWN_PART, text("x"))),
        (
            "sharegpt",
            turns("<video>x<image>", videos=["c.mp4"], images=["a.png"], system="Be brief."),
            own("<video>x<image>", system="Be brief.", videos=["c.mp4"], images=["a.png"]),
        ),
        ("sharegpt", turns("<video>x", videos=[PART]), parts(OWN_PART, text("x"))),
        ("sharegpt", turns("x"), own("x", images=[])),
        ("sharegpt", turns("<video>x", videos=[FRAMES]), own("<video>x", videos=[FRAMES])),
        (
            "sharegpt",
            turns("<video>x", videos=[{"path": FRAMES, "fps": 4}]),
            parts(STILLS, text("x")),
        ),
        (
            "llava",
            turns("<image>x", video={"video": FRAMES, "sample_fps": 4}),
            parts(STILLS, text("x")),
        ),
        (
            "llava",
            turns("<video><video>x", video=[FRAMES, "c.mp4"]),
            own("<video><video>x", videos=[FRAMES, "c.mp4"]),
        ),
        ("openai", parts(url("a.png"), STILLS, text()), parts(IMAGE, STILLS, text())),
        (
            "prompt",
            {"query": "x", "response": ANSWER, "videos": [{"path": FRAMES, "sample_fps": 4}]},
            parts(STILLS, text("x")),
        ),
        (
            "messages",
            parts({"type": "video", "path": FRAMES, "fps": 4}, text()),
            parts(STILLS, text()),
        ),
        ("prompt", {"prompt": f"<image>{ASKED}", "response": ANSWER, "images": ["a.png"]}, own()),
        (
            "prompt",
            {"question": ASKED, "answer": ANSWER, "image": "a.png", "system": "Be brief."},
            own(system="Be brief."),
        ),
        (
            "prompt",
            {"query": "x", "response": ANSWER, "video": "c.mp4", "timestamps": [0.4, 1.2]},
            parts(OWN_PART, text("x")),
        ),
        ("prompt", {"instruction": "x", "input": "y", "output": ANSWER}, own("x\ny", images=[])),
        (
            "prompt",
            {
                "query": f"<image>{ASKED}",
                "response": ANSWER,
                "history": [["<image>Who?", "Me."]],
                "images": ["b.png", "a.png"],
            },
            {
                "messages": [*WHO, *own()["messages"]],
                "images": ["b.png", "a.png"],
            },
        ),
        (  # as ms-swift and LLaMA-Factory say that there is nothing
            "messages",
            {**own(), "objects": {"ref": [], "bbox": []}, "tools": "[]", "label": True},
            own(),
        ),
        (
            "prompt",
            {
                "prompt": own()["messages"][:1],
                "completion": own()["messages"][1:],
                "images": ["a.png"],
            },
            own(),
        ),
    ],
)
@pytest.mark.parametrize("array", [False, True])
def test_a_format_says_what_our_own_form_says(
    folder: Path, name: str, record: Any, same: Any, array: bool
) -> None:
    path = write_jsonl(folder / "d.json", [record, record] if array else record)
    chats = Chats(path)
    assert chats.format == name
    assert said(chats) == expected(folder, *[same] * (1 + array))
    assert said(Chats(path, format=name)) == said(chats)
    assert said(pickle.loads(pickle.dumps(chats))) == said(chats)


def test_data_urls_are_read(folder: Path) -> None:
    record = parts(url(data_url(folder / "a.png")), text())
    chats = Chats(write_jsonl(folder / "d.jsonl", record))
    assert said(chats) == expected(folder, own())
    assert load_image(chats[0].media[0].file).getpixel((0, 0)) == (90, 30, 200)


def test_media_may_lie_elsewhere(folder: Path) -> None:
    (folder / "sets").mkdir()
    path = write_jsonl(folder / "sets" / "d.json", [turns(image="a.png")])
    assert said(Chats(path, media_root=folder)) == expected(folder, own())
    with pytest.raises(
        DataError, match=r"d\.json, line 1, element 0: got no such file: .*sets/a\.png"
    ):
        Chats(path)[0]
    with pytest.raises(DataError, match="--media_root: got nowhere, which is no folder"):
        Chats(path, media_root="nowhere")


def test_formats_are_told_by_all_of_the_file(folder: Path) -> None:
    mixed = [own("x", images=[]), *[own()] * 100, parts(url("a.png"), text())]
    assert Chats(write_jsonl(folder / "d.jsonl", *mixed)).format == "openai"
    assert (
        Chats(write_jsonl(folder / "d.jsonl", turns("x"), turns(image="a.png"))).format == "llava"
    )
    path = write_jsonl(folder / "d.jsonl", own(), turns(image="a.png"))
    with pytest.raises(DataError, match=r"messages \(.*:1\) and llava \(.*:2\).*--format messages"):
        Chats(path)
    assert len(Chats(path, format="llava")[1].media) == 1
    both = {**own("x", images=[]), "prompt": "x", "response": "y"}
    with pytest.raises(DataError, match=r"formats messages .* and prompt"):
        Chats(write_jsonl(folder / "d.jsonl", both))
    with pytest.raises(DataError, match="--format: got 'lava'; expected one of messages, openai"):
        Chats(path, format="lava")


@pytest.mark.parametrize(
    ("name", "record", "problem"),
    [
        ("openai", parts(url("http://a.b/c.png"), text()), "download it first"),
        ("openai", parts(url("data:image/png;base64,A"), text()), "base64 that cannot be decoded"),
        ("openai", parts({"type": "image_url"}, text()), "got image_url None in messages[0]"),
        (
            "openai",
            parts({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}),
            "with detail",
        ),
        ("openai", {"prompt": "x"}, "got the keys ['prompt']"),
        ("llava", turns("x", image="a.png"), "a.png' in image without a <image>"),
        (
            "llava",
            turns("<image><image>", image="a.png"),
            "<image> in conversations[0] and no image left for it; expected a path for each in "
            '"image"; add the path, or take the placeholder out',
        ),
        (
            "llava",
            turns("<image><image>", video="c.mp4"),
            "<image> in conversations[0] and no video left for it; expected a path for each in "
            '"video"',
        ),
        ("llava", turns("x", video="c.mp4"), "c.mp4' in video without a <image>"),
        ("llava", turns(image="no.png"), "/no.png (image); expected"),
        ("llava", turns("<image>" * 2, image=["a.png", "no.png"]), "no.png (image[1]); expected"),
        ("llava", turns("\ud83d", system="x"), "half a character (\\ud83d) in conversations[0];"),
        ("llava", {"image": "a.png"}, 'expected a list "conversations"'),
        (
            "llava",
            {"conversations": [{"from": "robot", "value": "x"}]},
            "got from 'robot' in conversations[0]; expected one of system, human",
        ),
        ("llava", {"conversations": [{"from": "gpt", "text": "x"}]}, "got value None in"),
        ("llava", turns("<video>x", video="c.mp4", start="soon"), "got start 'soon' in the record"),
        (
            "llava",
            turns("<video>x", video="c.mp4", start=3, end=2),
            "video_start 3 and video_end 2",
        ),
        ("llava", turns(image="a.png", images=["a.png"]), "the columns 'image' and 'images'"),
        (
            "sharegpt",
            {"conversations": [{"from": "observation", "value": "x"}], "images": ["a.png"]},
            "tools are not read",
        ),
        ("sharegpt", turns("<image>x", images=["a.png"], tools="[f]"), "the key 'tools'"),
        ("sharegpt", turns("<video>x", videos=[{"path": "n.mp4"}]), "n.mp4 (videos[0]); expected"),
        ("sharegpt", turns("x", system="<video>"), "in system and no video left for it; expected"),
        ("sharegpt", turns("<video>x", videos=[["a.png", 3]]), "got 3 for videos[0][1]; expected"),
        ("sharegpt", turns("<video>x", videos=[["n.png"]]), "n.png (videos[0][0]); expected"),
        ("sharegpt", turns("<video>x", videos=[[]]), "a video without frames in videos[0]"),
        ("sharegpt", turns("<image>x", images=[["a.png"]]), "got ['a.png'] for images[0]"),
        (
            "messages",
            parts({**STILLS, "video": ["a.png", "n.png"]}),
            "n.png (messages[0].content[0].video[1]); expected",
        ),
        ("messages", parts({**STILLS, "video": []}), "without frames in messages[0].content[0].vi"),
        (
            "messages",
            parts({**STILLS, "video": ["a.png", None]}),
            "got nothing for messages[0].con",
        ),
        (
            "messages",
            own("<image>x", images=[["a.png"]]),
            'for "images"; expected "images": ["a pa',
        ),
        ("messages", parts({**STILLS, "fps": 3}), "got fps 3 and sample_fps 4 in messages[0]"),
        ("messages", parts({**STILLS, "sample_fps": 0}), "got sample_fps 0 in messages[0].content"),
        ("messages", parts({**VIDEO, "sample_fps": 3}), "a video that is no list of frames"),
        ("messages", parts({**STILLS, "nframes": 0}), "got nframes 0 in messages[0].content[0]"),
        ("sharegpt", turns("<video>x", videos=[{"path": "c.mp4", "speed": 2}]), "for videos[0]"),
        ("sharegpt", turns("<image>x", images=[{"path": "a.png", "fps": 2}]), "for images[0]"),
        ("sharegpt", turns("<video><video>x", videos=["c.mp4"] * 2, end=2), "beside 2 videos"),
        ("sharegpt", turns(images=["a.png"], video_start=1), "got video_start without a video"),
        ("prompt", {"prompt": "x"}, "expected one of response, completion, output, answer"),
        ("prompt", {"prompt": "x", "query": "x", "output": "y"}, "the columns prompt, query"),
        (
            "prompt",
            {"question": "<image>x", "response": "y"},
            '<image> in question and no image left for it; expected a path for each in "images"',
        ),
        ("prompt", {"prompt": "x", "response": "y", "image": "n.png"}, "n.png (image); expected"),
        (
            "prompt",
            {"prompt": parts(text("<image>"))["messages"][:1], "completion": "y"},
            "<image> in prompt[0].content[0] and no image left",
        ),
        (
            "prompt",
            {"prompt": "<image>x", "response": "y", "images": ["a.png", "b.png"]},
            "b.png' in images[1] without a <image>",
        ),
        ("prompt", {"prompt": 3, "response": "y"}, "content int 3"),
        ("messages", parts({**VIDEO, "video_start": "1"}), "video_start '1' in messages[0]"),
        ("messages", parts({**VIDEO, "video_start": 2, "video_end": 2}), "the end after the start"),
        ("messages", {**own(), "video_start": 1}, "write it into the entry of the video"),
        ("messages", {**own(), "history": [["x", "y"]]}, "the key 'history' beside the messages"),
        ("messages", {**own(), "objects": {"ref": ["x"]}}, "write the boxes out"),
        ("prompt", {"prompt": "x", "completion": "y", "label": False}, "that is not wanted"),
        ("sharegpt", turns("x", kto_tag=False), "that is not wanted"),
        ("prompt", {"prompt": "x", "response": "y", "history": ["x"]}, "got ['x'] for 'history'"),
    ],
)
def test_usual_mistakes_are_named_by_the_line(
    folder: Path, name: str, record: Any, problem: str
) -> None:
    chats = Chats(write_jsonl(folder / "d.jsonl", "", record), format=name)
    with pytest.raises(DataError) as caught:
        chats[0]
    assert str(caught.value).startswith(f"{folder}/d.jsonl:2: got ")
    assert problem in str(caught.value)
