from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_lvx.data.chat import Chats, read_conversations
from ds_lvx.data.errors import DataError
from tests.data.media import chat, write_image, write_jsonl


def test_conversations_keep_order_paths_and_text(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png")
    first = chat(("image", "a.png"), ("text", "What?"), answer="Blue")
    first["messages"].insert(0, {"role": "system", "content": "Be brief."})
    path = write_jsonl(tmp_path / "d.jsonl", first, "", {**chat(("text", "Hi")), "id": 7})

    found = read_conversations(path)

    assert [c.source.line for c in found] == [1, 3]
    assert str(found[1].source) == f"{path}:3"
    assert [m.role for m in found[0].messages] == ["system", "user", "assistant"]
    assert [m.text for m in found[0].messages] == ["Be brief.", "What?", "Blue"]
    assert [(p.kind, p.value) for p in found[0].media] == [("image", str(image))]
    assert found[1].media == []


GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{'messages'", "one JSON object"),
        ("[1, 2]", "got list [1, 2]; expected one JSON object"),
        ('{"conversations": []}', "got the keys ['conversations']"),
        ('{"messages": []}', "at least one assistant message"),
        ('{"messages": [{"role": "assistant", "content": " "}]}', "at least one assistant"),
        ('{"messages": ["x"]}', "messages[0]"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "got role 'bot'"),
        ('{"messages": [{"role": "user", "content": 3}]}', "a string or a list"),
        ('{"messages": [{"role": "user", "content": ["x"]}]}', "content[0]"),
        ('{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}', "type 'audio'"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "'image'"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image", "image": "no.png"}]}]}',
            "no such file",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "video", "video": "."}]}]}',
            "a folder",
        ),
        (
            '{"messages": [{"role": "user", '
            '"content": [{"type": "video", "video": "https://a.b/c.mp4"}]}]}',
            "download it first",
        ),
        *(
            (
                f'{{"messages": [{{"role": "user", "content": [{{"type": "{kind}", '
                f'"{kind}": "{value}"}}]}}]}}',
                expected,
            )
            for kind in ("image", "video")
            for value, expected in (
                ("data:image/png;base64," + "iVBORw0KGgo" * 11_000, "write the data to a file"),
                ("a" * 120_000, "a path that cannot be looked up"),
                ("a\\u0000b", "no such file"),
                ("https://a.b/" + "c" * 120_000, "download it first"),
            )
        ),
        (
            '{"messages": [{"role": "assistant", '
            '"content": [{"type": "image", "image": "d.jsonl"}]}]}',
            "text alone from the assistant",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, expected: str) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", GOOD, line)
    with pytest.raises(DataError) as caught:
        read_conversations(path)
    assert str(caught.value).startswith(f"{path}:2: got ")
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 1000


def _record(**more: Any) -> dict[str, Any]:
    return {**json.loads(GOOD), **more}


def _content(*parts: Any, **more: Any) -> dict[str, Any]:
    return _record(messages=[{"role": "user", "content": list(parts), **more}, ANSWER])


def _text(text: str, **more: Any) -> dict[str, Any]:
    return _record(messages=[{"role": "user", "content": text}, ANSWER], **more)


ANSWER = {"role": "assistant", "content": "b"}
LEFT_OUT = {"role": "assistant", "content": "b", "weight": 0}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        # media that are said and not there, and there and not said
        (_text("<image>Which?"), "<image> in messages[0].content and no image left"),
        (_text("<image><image>", images=["a.png"]), "<image> in messages[0].content and no"),
        (_text("<image>", videos=["a.png"]), "<image> in messages[0].content and no image"),
        (_text("Which?", images=["a.png"]), "a.png' in images[0] without a <image>"),
        (_text("<image>", images="a.png"), "'a.png' for \"images\"; expected"),
        (_text("<image>", images=[{"path": "a.png"}]), 'for "images"; expected'),
        (_text("<image>", images=["no.png"]), "no.png (images[0])"),
        (_text("Which?", image="a.png"), "the key 'image' beside the messages"),
        (_text("Which?", audios=["a.wav"]), "the key 'audios' beside the messages"),
        (_text("Which?", system="Be brief."), "write it as the first message"),
        (_content({"type": "text", "text": "<video>"}), "<video> in messages[0].content[0]"),
        (_content({"type": "video"}), "'video' without a path in messages[0].content[0]"),
        # keys that nobody reads
        (_content({"type": "image", "image": "a.png", "fps": 5}), "the key 'fps' in messages[0]."),
        (_content({"type": "video", "video": "a.png", "total_pixels": 9}), "key 'total_pixels'"),
        (_content({"type": "text", "text": "a"}, name="Ann"), "the key 'name' in messages[0]"),
        (_record(messages=[{**ANSWER, "tool_calls": [1]}]), "the key 'tool_calls' in messages[0]"),
        (_content({"type": "image", "path": "a.png", "url": "a.png"}), "the key 'url' in"),
        (_content({"type": "image", "image": "a.png", "path": "a.png"}), "the key 'path' in"),
        (_content({"type": "image", "url": "https://a/b.png"}), "download it first"),
        (_content({"type": "image", "image": ["a.png"]}), "give each as an image"),
        # values of the wrong kind or size
        (_content({"type": "video", "video": "a.png", "fps": "5"}), "fps '5' in messages[0]"),
        (_content({"type": "video", "video": "a.png", "fps": 0}), "a number from 0.0001 to 1,000"),
        (_content({"type": "video", "video": "a.png", "nframes": 2.5}), "nframes 2.5 in"),
        (_content({"type": "video", "video": "a.png", "nframes": True}), "nframes True in"),
        (_content({"type": "video", "video": "a.png", "fps": 1, "nframes": 2}), "drop the other"),
        (_content({"type": "image", "image": "a.png", "max_pixels": 9.5}), "max_pixels 9.5 in"),
        (
            _content({"type": "image", "image": "a.png", "min_pixels": 0}),
            "a whole number from 1 to",
        ),
        (
            _content({"type": "image", "image": "a.png", "min_pixels": 9, "max_pixels": 4}),
            "min_pixels 9 and max_pixels 4 in messages[0].content[0]; expected the most above",
        ),
        (_content({"type": "text", "text": "a", "literal": 1}), "literal 1 in"),
        (_record(messages=[{**ANSWER, "weight": 0.5}]), "weight 0.5 in messages[0]"),
        (_record(messages=[{**ANSWER, "weight": True}]), "weight True in messages[0]"),
        (_content({"type": "text", "text": "a"}, weight=1), "weight 1 in messages[0]"),
        (_record(messages=[LEFT_OUT]), "no assistant's text that is learnt"),
        # text and JSON
        (
            '{"messages": [{"role": "user", "content": "cut \\ud83d"}]}',
            "half a character",
        ),
        (_content({"type": "image", "image": "\ud83d.png"}), "half a character"),
        ('{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"messages": [], "id": ' + "7" * 5000 + "}", "expected one JSON object"),
        (GOOD[:-1] + ', "messages": []}', "the key 'messages' occurs twice"),
        # files
        (
            _content({"type": "image", "image": "data:image/png;base64," + "A" * 9999}),
            "10,021 char",
        ),
        (_content({"type": "image", "image": "a" * 9999}), "a path that cannot be looked up"),
        (_content({"type": "image", "image": "a\0.png"}), "messages[0].content[0]"),
        (_content({"type": "image", "image": "file://host/a.png"}), "a file of another host"),
        (_content({"type": "image", "image": "file:///no/a.png"}), "no such file: /no/a.png"),
    ],
)
def test_nothing_of_a_line_is_dropped_in_silence(
    tmp_path: Path, record: Any, expected: str
) -> None:
    write_image(tmp_path / "a.png")
    path = write_jsonl(tmp_path / "d.jsonl", GOOD, record)
    with pytest.raises(DataError) as caught:
        read_conversations(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: got ")
    assert expected in message
    assert len(message) < 1000, "values are cut"


def test_media_beside_the_messages_stand_where_their_placeholders_are(tmp_path: Path) -> None:
    """LLaMA-Factory's and ms-swift's own format."""
    paths = {name: str(tmp_path / name) for name in ("a.png", "b.png", "c.mp4")}
    for path in paths.values():
        Path(path).touch()
    first = {"role": "user", "content": "<image>One?<video>\n<image>"}
    answer = {"role": "assistant", "content": "No <image> is here."}
    literal = {"type": "text", "text": "<image>", "literal": True}
    last = {"role": "user", "content": [{"type": "image"}, literal]}
    record = {
        "messages": [first, answer, last, ANSWER],
        "images": ["a.png", "b.png", "a.png"],
        "videos": ["c.mp4"],
    }
    (found,) = read_conversations(write_jsonl(tmp_path / "d.jsonl", record))
    assert [(p.kind, p.value) for p in found.messages[0].parts] == [
        ("image", paths["a.png"]),
        ("text", "One?"),
        ("video", paths["c.mp4"]),
        ("text", "\n"),
        ("image", paths["b.png"]),
    ]
    assert found.messages[1].text == "No <image> is here."
    assert [(p.kind, p.value) for p in found.messages[2].parts] == [
        ("image", paths["a.png"]),
        ("text", "<image>"),
    ]


def test_what_a_line_may_say_is_kept(tmp_path: Path) -> None:
    """Weights, rates, transformers' words for files; keys without a value say nothing."""
    clip = tmp_path / "a clip.mp4"
    clip.touch()
    given = [
        {"type": "video", "video": "a clip.mp4", "fps": 5, "image": None},
        {"type": "video", "video": clip.as_uri(), "nframes": 2},
        {"type": "video", "video": f"file://{clip}"},
        {"type": "video", "path": "a clip.mp4", "nframes": 3, "url": None},
        {"type": "video", "url": str(clip)},
    ]
    record = _content(*given, weight=0, name=None)
    record["messages"][1:] = [LEFT_OUT, {**ANSWER, "weight": 1.0}]
    record |= {"images": [], "system": "", "id": 7, "licence": {"a": [1]}}
    (found,) = read_conversations(write_jsonl(tmp_path / "d.jsonl", record))
    assert [(p.value, p.fps, p.nframes) for p in found.media] == [
        (str(clip), 5, None),
        (str(clip), None, 2),
        (str(clip), None, None),
        (str(clip), None, 3),
        (str(clip), None, None),
    ]
    assert [m.learnt for m in found.messages] == [False, False, True]


def test_bytes_that_are_no_text_are_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\xff\xfe{}\n")
    with pytest.raises(DataError, match=r"d\.jsonl:2: .*one JSON object"):
        read_conversations(path)


def test_empty_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got an empty file"):
        read_conversations(write_jsonl(tmp_path / "d.jsonl", "", "  "))
    with pytest.raises(DataError, match="got no such file"):
        read_conversations(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="got a folder"):
        read_conversations(tmp_path)


def test_held_out_samples_are_those_of_train_test_split(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    lines = [chat(("text", f"Question {n}?"), answer=f"{n}") for n in range(37)]
    data = write_jsonl(tmp_path / "data.jsonl", *lines)
    whole = Chats(data)
    for size, seed in ((5, 0), (0.1, 3), (0.5, 3), (36, 1)):
        parts = whole.split(size, seed=seed)
        rows = datasets.Dataset.from_dict({"n": list(range(37))})
        given = size if size < 1 else int(size)
        expected = rows.train_test_split(test_size=given, seed=seed)
        for part, name in zip(parts, ("test", "train"), strict=True):
            numbers = [int(each.messages[1].text) for each in (part[n] for n in range(len(part)))]
            assert numbers == sorted(expected[name]["n"])
            assert part.blocks == (len(part),)
    # What was left out before stays so.
    some, others = whole.without(range(0, 37, 2)).split(0.5, seed=0)
    numbers = [int(p[n].messages[1].text) for p in (some, others) for n in range(len(p))]
    assert sorted(numbers) == list(range(1, 37, 2))
    assert (len(some), len(others)) == (9, 9)
    for size in (37, 0.999):
        with pytest.raises(DataError, match=r"got 37 samples, of which 37 are to be held out"):
            whole.split(size, seed=0)
