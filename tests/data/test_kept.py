"""What was found about a film is kept on disk, and no more than that."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ds_lvx.data import kept, listing
from ds_lvx.data.frames import probe
from ds_lvx.data.limits import DEFAULT_LIMITS, Limits
from tests.data.films import Kind, write

B = {"bf": "2", "preset": "veryfast"}


@pytest.fixture
def probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The films that were probed in earnest, small ones as large ones."""
    paths: list[str] = []

    def noted(path: str, **options: Any) -> Any:
        paths.append(path)
        return probe(path, **options)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "SMALL_BYTES", 0)
    monkeypatch.setattr(kept, "probe", noted)
    return paths


@pytest.mark.parametrize("name", ["a.mp4", "a.ts", "a.avi", "a.webm"])
def test_a_film_is_looked_at_once(tmp_path: Path, probed: list[str], name: str) -> None:
    codec = "libvpx" if name == "a.webm" else "libx264"
    options = {} if codec == "libvpx" else B
    kind = Kind(name, codec, options=options, times=lambda n: n * n)
    path = str(write(tmp_path, kind))
    first, second = (kept.kept_probe(path, limits=DEFAULT_LIMITS) for _ in range(2))
    assert first == second == probe(path)
    assert probed == [path]
    assert kept.kept_probe(path, limits=Limits(max_gap_s=1e6)) == first
    assert len(probed) == 2, "other limits may refuse what these let pass"


def test_a_changed_film_is_another_one(tmp_path: Path, probed: list[str]) -> None:
    path = write(tmp_path, Kind("a.ts", "libx264", options=B))
    before = kept.kept_probe(str(path), limits=DEFAULT_LIMITS)
    path.write_bytes(path.read_bytes() * 2)
    assert len(kept.kept_probe(str(path), limits=DEFAULT_LIMITS)) == 2 * len(before)
    os.utime(path, ns=(1, 1))
    kept.kept_probe(str(path), limits=DEFAULT_LIMITS)
    assert len(probed) == 3


def test_what_is_wrong_is_not_kept(tmp_path: Path, probed: list[str]) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("no film")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a\.mp4: got"):
            kept.kept_probe(str(path), limits=DEFAULT_LIMITS)
    assert len(probed) == 2
    with pytest.raises(ValueError, match="no such file"):
        kept.kept_probe(str(tmp_path / "none.mp4"), limits=DEFAULT_LIMITS)


def test_a_damaged_record_is_written_anew(tmp_path: Path, probed: list[str]) -> None:
    path = str(write(tmp_path, Kind("a.ts", "libx264", options=B)))
    kept.kept_probe(path, limits=DEFAULT_LIMITS)
    (record,) = (tmp_path / "cache" / "ds_lvx" / "films").glob("*.json")
    for wrong in ('{"first": 3}', '{"first": 0, "steps": 3}', "[]", "{"):
        record.write_text(wrong)
        assert kept.kept_probe(path, limits=DEFAULT_LIMITS) == probe(path)


def test_small_films_are_not_kept(
    tmp_path: Path, probed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "SMALL_BYTES", 1 << 21)
    kept.kept_probe(str(write(tmp_path, Kind("a.mp4", "libx264"))), limits=DEFAULT_LIMITS)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("movflags", ["", "faststart", "negative_cts_offsets"])
def test_of_an_mp4_the_header_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, movflags: str
) -> None:
    muxing = {"movflags": movflags} if movflags else {}
    path = str(write(tmp_path, Kind("a.mp4", "libx264", options=B, muxing=muxing)))
    expected = probe(path)
    monkeypatch.setattr(listing, "_from_packets", None)  # which reads all of a film
    assert probe(path) == expected


def test_of_an_mp4_little_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, Kind("a.mov", "rawvideo", pixels="yuv422p", size=(640, 480)))
    # Of a film of 24 frames the usual number of frames to compare would be most.
    monkeypatch.setattr(listing, "_COMPARED", 2)
    before = _bytes_read()
    assert len(probe(str(path))) == 24
    assert _bytes_read() - before < path.stat().st_size / 2


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))
