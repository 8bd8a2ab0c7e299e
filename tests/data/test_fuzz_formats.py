"""Records of every format with anything in any place: read, or refused by file and line."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from ds_lvx.data.chat import Chats
from ds_lvx.data.errors import DataError
from ds_lvx.data.formats import FORMATS
from tests.data.formats_case import PART, own, parts, text, turns, url, write_media
from tests.data.media import write_jsonl

RECORDS = {
    "messages": own(system="Be brief."),
    "openai": parts(url("a.png"), url("data:image/png;base64,QUJD"), text()),
    "llava": turns("<video>x", video="c.mp4", start=0.4, end=1.2),
    "sharegpt": turns("<video><image>x", videos=[PART], images=["a.png"], system="y"),
    "prompt": {"instruction": "x", "input": "y", "output": "z", "images": ["a.png"]},
    "dataset_info": {
        "instruction": "x",
        "input": "y",
        "output": "z",
        "images": ["a.png"],
        "history": [["a", "b"]],
        "system": "s",
    },
}
ODD: tuple[Any, ...] = (None, 3, -1.5, True, "", "x", "<image>", "data:", "00:01", [], {}, [[]])
ODD += ([{}], {"path": "a.png"}, {"path": 3}, {"url": "a.png"}, [1, 2], {"role": "user"}, "\ud83d")


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every object and list with every key in it."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    inner = [value[key] for key in keys if isinstance(value[key], dict | list)]
    return found + [place for each in inner for place in places(each)]


@pytest.mark.parametrize("name", RECORDS)
def test_anything_anywhere_is_read_or_refused(tmp_path: Path, name: str) -> None:
    folder, chosen = write_media(tmp_path), random.Random(0)
    lines = []
    for _ in range(400):
        record = copy.deepcopy(RECORDS[name])
        for _ in range(chosen.choice((1, 1, 2))):
            holder, key = chosen.choice(places(record) or [(record, "x")])
            if chosen.random() < 0.2 and isinstance(holder, dict):
                del holder[key]
            else:
                holder[key] = copy.deepcopy(chosen.choice(ODD))
        lines.append(json.dumps(record))
    path = write_jsonl(folder / "d.jsonl", *lines)
    if name == "dataset_info":
        (folder / name).with_suffix(".json").write_text(json.dumps({"x": {"file_name": path.name}}))
        chats = Chats(folder / "dataset_info.json")
    else:
        chats = Chats(path, format=name)
    refused = [reason for index in range(len(chats)) if (reason := refusal(chats, index))]
    assert 0 < len(refused) < len(chats)


def refusal(chats: Chats, index: int) -> str | None:
    """Why a record is refused, by its file and line; None where it is read."""
    record = chats.lines.record(index)
    assert all(each.sniff(record) in (0, 1, 2) for each in FORMATS.values())
    reason = None
    try:
        chats.media(index)
        assert chats[index].messages
    except DataError as error:
        reason = str(error)
    except Exception as error:
        raise AssertionError(repr(record)) from error
    start = f"{chats.lines.path}:{index + 1}: got "
    assert reason is None or (reason.startswith(start) and len(reason) < 2000), (reason, record)
    return reason
