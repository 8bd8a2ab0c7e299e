from __future__ import annotations

from pathlib import Path

import pytest

from ds_lvx.data.chat import read_conversations
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
        ("[1, 2]", 'a list "messages"'),
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
                ("data:image/png;base64," + "iVBORw0KGgo" * 11_000, "write what it holds into a"),
                ("a" * 120_000, "no such file"),
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
