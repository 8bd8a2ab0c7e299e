"""Files of lines: what is no JSONL is named, and a large one costs no more than an index."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import pytest

from ds_lvx.data import index
from ds_lvx.data.errors import DataError
from ds_lvx.data.limits import Limits
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
        (b'[{"a": 1},\n {"a": 2}', r"d\.jsonl: got a JSON array.* from line 2: neither a comma"),
        (b'[{"a": 1},\n {"a": 2},\n]', r"got a JSON array.* from line 3: Expecting value"),
        (b'[{"a": 1}]\n{"a": 2}', r"got a JSON array.* from line 1: text after"),
        ('\ufeff\n[{"a": '.encode() + b"[" * 10_000, r"d\.jsonl: got a JSON array.*too deeply"),
        (b"[]", r"d\.jsonl: got an empty file"),
        ('{"a": 1}\n'.encode("utf-16"), r"d\.jsonl: got a file in UTF-16.*iconv -f UTF-16"),
        (b"\xef\xbb\xbf", r"d\.jsonl: got an empty file"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, data: bytes, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        Lines(_file(tmp_path, data))


def test_an_array_is_read_element_by_element(tmp_path: Path) -> None:
    data = '\ufeff [\n{"a": "é]"},\n\n{"a":\n 2} , {"a": 3}, 4]\n'.encode()
    lines = pickle.loads(pickle.dumps(Lines(_file(tmp_path, data))))
    assert [lines.record(n)["a"] for n in range(3)] == ["é]", 2, 3]
    assert [lines.source(n).line for n in range(4)] == [2, 4, 5, 5]
    with pytest.raises(
        DataError, match=r"d\.jsonl, line 5, element 3: got int 4; expected one JSON object"
    ):
        lines.record(3)


def test_utf16_without_its_mark_is_named_by_the_line(tmp_path: Path) -> None:
    lines = Lines(_file(tmp_path, '{"a": 1}\n'.encode("utf-16-le")))
    with pytest.raises(DataError, match=r"d\.jsonl:1: .*NUL bytes as of UTF-16"):
        lines.record(0)


@pytest.fixture
def scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read from end to end, small ones cached as large ones."""
    paths: list[str] = []

    def noted(path: str) -> index.Index:
        paths.append(path)
        return scan(path)

    scan = index.scan
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "SMALL_BYTES", 0)
    monkeypatch.setattr("ds_lvx.data.lines.scan", noted)
    return paths


def _shown(lines: Lines) -> list[object]:
    return [lines.sha256, *((lines.source(n), lines.record(n)) for n in range(len(lines)))]


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, scans: list[str]) -> None:
    path = _file(tmp_path, b'{"a": 1}\n\n{"a": 2}')
    first, second = Lines(path), Lines(path)
    assert _shown(first) == _shown(second)
    assert len(scans) == 1
    assert second.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(b'{"a": 1}\n{"a": 22}')
    os.utime(path, ns=(1, 1))
    assert [source.line for source in map(Lines(path).source, range(2))] == [1, 2]
    Lines(path)
    assert len(scans) == 2
    assert len([*(tmp_path / "cache").rglob("*.json")]) == 1, "one for each path"


def test_a_damaged_index_is_made_anew(tmp_path: Path, scans: list[str]) -> None:
    path = _file(tmp_path, b'{"a": 1}\n{"a": 2}')
    expected = _shown(Lines(path))
    [kept] = (tmp_path / "cache").rglob("*.json")
    record = json.loads(kept.read_text())
    for key, wrong in (("sum", 1), ("lines", "0"), ("lines", 3), ("sha256", None), ("file", [])):
        kept.write_text(json.dumps({**record, key: wrong}))
        assert _shown(Lines(path)) == expected
        assert json.loads(kept.read_text()) == record
    kept.write_text("{")
    assert _shown(Lines(path)) == expected
    assert len(scans) == 7


def test_small_files_are_not_kept(
    tmp_path: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "SMALL_BYTES", 1 << 21)
    Lines(_file(tmp_path, b'{"a": 1}'))
    assert not (tmp_path / "cache").exists()


def test_a_line_without_an_end_is_not_read(tmp_path: Path, scans: list[str]) -> None:
    path = _file(tmp_path, b'{"a": 1}\n' + b"x" * 2**24 + b'\n{"a": 2}\n')
    tracemalloc.start()
    lines = Lines(path, limits=Limits(max_line_bytes=2**21))
    with pytest.raises(DataError, match=r"d\.jsonl:2: got a line of 16,777,217 .*--max_line_bytes"):
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
