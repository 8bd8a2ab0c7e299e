"""Films that are no whole, no film, too much, or no local file."""

from __future__ import annotations

import contextlib
import re
import shutil
import struct
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import pytest
from av.video.frame import PictureType

from ds_lvx.data import limits, listing
from ds_lvx.data.frames import choose, decode, probe
from ds_lvx.data.limits import DEFAULT_LIMITS, Limits
from tests.data.films import FRAMES, HEIGHT, RATE, WIDTH, Kind, remux, write

B = {"bf": "2", "preset": "veryfast"}


def _pixels(images: Any) -> list[bytes]:
    return [image.tobytes() for image in images]


@pytest.mark.parametrize("name", ["a.mp4", "fast.mp4", "a.mkv", "a.avi", "a.mov"])
def test_half_a_film_is_refused(tmp_path: Path, name: str) -> None:
    muxing = {"movflags": "faststart"} if name == "fast.mp4" else {}
    path = write(tmp_path, Kind(name, "libx264", options=B, muxing=muxing))
    whole = path.read_bytes()
    for part in (0.5, 0.9):
        path.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(ValueError, match=r"got the first [\d,]+ bytes .* cannot be decoded"):
            probe(str(path))
    path.write_bytes(whole + b"TAG" + bytes(200))  # what some programs append
    assert len(probe(str(path))) == FRAMES


def test_half_a_film_that_tells_only_its_duration(tmp_path: Path) -> None:
    path = write(tmp_path, Kind("a.flv", "flv"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="its end is missing"):
        probe(str(path))


@pytest.mark.parametrize(
    "name", ["12:30.mp4", "http:x.mp4", "file:y.mp4", "concat:a|b.mp4", "%d.mp4"]
)
def test_names_are_no_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    source = write(tmp_path, Kind("a.mp4", "libx264", options=B))
    shutil.copy(source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert len(list(decode(probe(name), range(FRAMES)))) == FRAMES


def test_lists_of_other_files_are_not_followed(tmp_path: Path) -> None:
    write(tmp_path, Kind("a.ts", "libx264", options=B))
    (tmp_path / "list.m3u8").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\na.ts\n#EXT-X-ENDLIST\n"
    )
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.ts\n")
    (tmp_path / "call.mp4").write_text("v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n")
    for name in ("list.m3u8", "list.mp4", "call.mp4"):
        with pytest.raises(ValueError, match=f"{name}: got a"):
            probe(str(tmp_path / name))


def test_a_title_that_is_no_utf8(tmp_path: Path) -> None:
    path = write(tmp_path, Kind("a.mp4", "libx264", options=B, title="Caf\u00e9 \u2603 film"))
    data = path.read_bytes()
    assert data.count("Caf\u00e9".encode()) == 1
    path.write_bytes(data.replace("Caf\u00e9".encode(), b"Caf\xe9\x8e"))
    assert len(probe(str(path))) == FRAMES


def test_a_stream_of_an_unknown_coding(tmp_path: Path) -> None:
    path = write(tmp_path, Kind("a.mp4", "libx264", options=B))
    data = path.read_bytes()
    entry = data.rindex(b"avc1")  # the first one stands among the brands
    path.write_bytes(data[:entry] + b"zzzz" + data[entry + 4 :])
    with pytest.raises(ValueError, match=r"a\.mp4: got a video stream in a coding"):
        probe(str(path))


def test_a_gap_costs_nothing_and_has_a_limit(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        Kind("a.mkv", "libx264", options=B, times=lambda n: n + (n > 9) * 20_000_000_000),
    )
    with pytest.raises(ValueError, match=r"2,000,000,000 s between frames 9 and 10.*--max_gap_s"):
        probe(str(path))
    video = probe(str(path), limits=Limits(max_gap_s=1e10))
    assert choose(video, fps=1) == (0, 9, 10, 20)
    assert choose(video, fps=1, max_frames=2) == (9, 20)
    assert len(list(decode(video, (0, 9, 10, 20)))) == 4


def test_a_frame_larger_than_its_container_says(tmp_path: Path) -> None:
    path = write(tmp_path, Kind("a.avi", "mjpeg", pixels="yuvj420p", size=(1600, 1200)))
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<II", 1600, 1200), struct.pack("<II", 64, 64)))
    small = Limits(max_pixels=1_000_000)
    with pytest.raises(ValueError, match=r"a\.avi: .*1,000,000 pixels"):
        probe(str(path), limits=small)
    assert {image.size for image in decode(probe(str(path)), range(3))} == {(1600, 1200)}


def test_frames_in_another_order_than_listed_are_refused(tmp_path: Path) -> None:
    """Late in the film, where nothing was compared when it was probed."""
    source = write(tmp_path, Kind("source.mp4", "libx264", options=B))

    def exchanged(_: int, packet: Any) -> Any:
        if packet.pts in (17 * 1024, 19 * 1024):
            packet.pts = 36 * 1024 - packet.pts
        return packet

    path = remux(source, tmp_path / "a.mkv", change=exchanged)
    video = probe(str(path))
    assert len(list(decode(video, range(17)))) == 17
    with pytest.raises(ValueError, match=r"a\.mkv: got no frame 1[789], at 1\.[789]00 s"):
        list(decode(video, range(FRAMES)))


def test_times_beyond_all_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, Kind("a.h264", "libx264", options=B))
    monkeypatch.setattr(listing, "_step", lambda film: 1 << 63)
    monkeypatch.setattr(listing, "decoded", lambda film: [SimpleNamespace(pts=None, dts=None)] * 2)
    with pytest.raises(ValueError, match=r"a\.h264: got times or sizes that no film has"):
        probe(str(path))


def test_limits_of_frames(tmp_path: Path) -> None:
    path = str(write(tmp_path, Kind("a.mp4", "libx264", options={**B, "g": "1000"})))
    with pytest.raises(ValueError, match=r"more than 20 frames.*--max_film_frames"):
        probe(path, limits=Limits(max_film_frames=20))
    video = probe(path, limits=Limits(max_film_frames=FRAMES))
    assert len(list(decode(video, [10], limits=Limits(max_lead_in_frames=10)))) == 1
    with pytest.raises(ValueError, match=r"before frame 11.*--max_lead_in_frames"):
        list(decode(video, [11], limits=Limits(max_lead_in_frames=10)))
    bare = str(write(tmp_path, Kind("a.h264", "libx264", options=B)))
    with pytest.raises(ValueError, match=r"more than 20;.*--max_lead_in_frames"):
        probe(bare, limits=Limits(max_lead_in_frames=20))
    assert len(probe(bare, limits=Limits(max_lead_in_frames=FRAMES))) == FRAMES


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_transparency_that_no_decoder_gives_is_refused(tmp_path: Path, codec: str) -> None:
    kind = Kind("a.webm", codec, pixels="yuva420p", options={"auto-alt-ref": "0"})
    path = write(tmp_path, replace(kind, source="yuva420p"))
    with pytest.raises(ValueError, match=r"a\.webm: got a film with transparency"):
        probe(str(path))


@pytest.mark.parametrize("name", ["a.h264", "a.mp4"])
def test_long_decoding_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = str(write(tmp_path, Kind(name, "libx264", options={**B, "g": "1000"})))
    monkeypatch.setattr(limits, "_PATIENCE", 12)
    with pytest.warns(UserWarning, match=r"a\.(h264|mp4): 12 frames decoded so far") as said:
        list(decode(probe(path), [20]))
    assert len(said) == (2 if name == "a.h264" else 1)


def _repaired(path: Path, command: str) -> Path:
    """What the command that an error gives does, by PyAV."""
    found = re.search(r"ffmpeg -i (\S+) -an( -g 50)? fixed\.mp4", command)
    assert found is not None, command
    assert found[1] == str(path)
    fixed = path.with_name("fixed.mp4")
    with av.open(found[1]) as read, av.open(str(fixed), "w") as written:
        stream = written.add_stream("libx264", rate=RATE)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.codec_context.gop_size = 50 if found[2] else 250
        count = 0
        for packet in read.demux(video=0):
            with contextlib.suppress(av.error.InvalidDataError):
                for frame in packet.decode():
                    frame.pts, frame.time_base = count, Fraction(1, RATE)
                    frame.pict_type = PictureType.NONE
                    written.mux(stream.encode(frame))
                    count += 1
        written.mux(stream.encode())
    return fixed


def _bad(folder: Path, what: str) -> tuple[Path, Limits]:
    path, few = folder / what, Limits(max_lead_in_frames=10)
    if what == "damaged.mp4":
        data = bytearray(write(folder, Kind("a.mp4", "libx264", options=B)).read_bytes())
        start = data.index(b"mdat") + 1500
        data[start : start + 60] = bytes(7 * n % 256 for n in range(60))
        path.write_bytes(data)
        return path, DEFAULT_LIMITS
    one = {} if what == "bare.h264" else {"g": "1000"}
    return write(folder, Kind(what, "libx264", options={**B, **one})), few


@pytest.mark.parametrize("what", ["damaged.mp4", "bare.h264", "one-keyframe.mp4"])
def test_the_repairs_that_errors_name_are_repairs(tmp_path: Path, what: str) -> None:
    path, bounds = _bad(tmp_path, what)
    with pytest.raises(ValueError, match=re.escape(what)) as caught:
        _last_frames(path, bounds)
    fixed = _repaired(path, str(caught.value))
    if what == "one-keyframe.mp4":
        bounds = Limits(max_lead_in_frames=50)
    assert _last_frames(fixed, bounds if what != "bare.h264" else DEFAULT_LIMITS)


def _last_frames(path: Path, bounds: Limits) -> list[bytes]:
    video = probe(str(path), limits=bounds)
    return _pixels(decode(video, [len(video) - 2, len(video) - 1], limits=bounds))
