"""Files of lines: what is no JSONL is named, and a large one costs no more than an index."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import pytest

from ds_lvx.data import lines as module
from ds_lvx.data.errors import DataError
from ds_lvx.data.lines import Lines


def _file(folder: Path, data: bytes) -> Path:
    path = folder / "d.jsonl"
    path.write_bytes(data)
    return path


def test_lines_are_found_again_with_their_numbers(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    data = mark + b'{"a": 1}\r\n\n  \n' + mark + b'{"a": "\xc3\xa9"}\n' + mark + b'\n{"a": 3}'
    lines = pickle.loads(pickle.dumps(Lines(_file(tmp_path, data))))
    assert [lines.record(n)["a"] for n in range(len(lines))] == [1, "é", 3]
    assert [lines.source(n).line for n in range(len(lines))] == [1, 4, 6]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'[{"a": 1},\n {"a": 2}]', r"d\.jsonl: got a JSON array.*jq -c '\.\[\]'"),
        ('\ufeff\n[{"a": 1}]'.encode(), r"d\.jsonl: got a JSON array"),
        ('{"a": 1}\n'.encode("utf-16"), r"d\.jsonl: got a file in UTF-16.*iconv -f UTF-16"),
        (b"\xef\xbb\xbf", r"d\.jsonl: got an empty file"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, data: bytes, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        Lines(_file(tmp_path, data))


def test_utf16_without_its_mark_is_named_by_the_line(tmp_path: Path) -> None:
    lines = Lines(_file(tmp_path, '{"a": 1}\n'.encode("utf-16-le")))
    with pytest.raises(DataError, match=r"d\.jsonl:1: .*NUL bytes as of UTF-16"):
        lines.record(0)


def test_a_line_without_an_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 2**21)
    path = _file(tmp_path, b'{"a": 1}\n' + b"x" * 2**24 + b'\n{"a": 2}\n')
    tracemalloc.start()
    lines = Lines(path)
    with pytest.raises(DataError, match=r"d\.jsonl:2: got a line of 16,777,217 bytes"):
        lines.record(1)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2**23
    assert lines.record(2) == {"a": 2}


def test_a_line_that_changes_is_noticed_and_one_that_is_added_is_not(tmp_path: Path) -> None:
    path = _file(tmp_path, b'{"a": 1}\n{"a": 2}')
    lines = Lines(path)
    path.write_bytes(b'{"a": 3}\n{"a": 2}\n{"a": 4}\n')
    assert lines.record(1) == {"a": 2}
    with pytest.raises(DataError, match=r"d\.jsonl:1: got a line that was changed"):
        lines.record(0)
