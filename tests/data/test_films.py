"""Frames of every kind of film, compared with a plain decoder's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from ds_lvx.data.frames import DecodeCount, choose, decode, probe
from tests.data.films import FRAMES, GOP, HEIGHT, WIDTH, Kind, drawing, plain, remux, write

B = {"bf": "2", "preset": "veryfast"}
OPEN = {"preset": "veryfast", "x264-params": "open-gop=1:bframes=3:scenecut=0"}
QUIET = "log-level=none:bframes=3"
ALT = {"auto-alt-ref": "1", "lag-in-frames": "12", "arnr-maxframes": "7", "cpu-used": "8"}
# One thread: two of them write other bytes from run to run, at times with a gap between frames.
INTERLACED = {"bf": "2", "flags": "+ildct+ilme", "threads": "1"}
CIF = (176, 144)

# Streams without times: 25 frames a second are assumed.
BARE = (".h264", ".hevc", ".m2v", ".mjpeg", ".obu")

KINDS = [
    *(Kind(f"h264.{end}", "libx264", options=B) for end in ("mp4", "mov", "mkv", "ts", "flv")),
    *(Kind(f"h264.{end}", "libx264", options=B) for end in ("avi", "nut", "3gp", "h264", "asf")),
    Kind("fragments.mp4", "libx264", options=B, muxing={"movflags": "frag_keyframe+empty_moov"}),
    Kind("negative.mp4", "libx264", options=B, muxing={"movflags": "negative_cts_offsets"}),
    Kind("open-gop.mp4", "libx264", options=OPEN),
    Kind("open-gop.ts", "libx264", options=OPEN),
    Kind("refresh.mp4", "libx264", options={"x264-params": "intra-refresh=1"}),
    Kind("interlaced.mp4", "libx264", options={"x264-params": "interlaced=1:bframes=2"}),
    Kind("interlaced.ts", "libx264", options={"x264-params": "interlaced=1:bframes=2"}),
    Kind("ten-bits.mkv", "libx264", pixels="yuv420p10le", options=B),
    Kind("variable.mp4", "libx264", options=B, times=lambda index: index * index),
    Kind("variable.mkv", "libx264", options=B, times=lambda index: index * index),
    Kind("late.mp4", "libx264", options=B, times=lambda index: index + 77),
    Kind("hevc.mp4", "libx265", options={"x265-params": f"{QUIET}:open-gop=1"}),
    Kind("hevc.mkv", "libx265", options={"x265-params": QUIET}),
    Kind("hevc.hevc", "libx265", options={"x265-params": QUIET}),
    Kind("hevc.ts", "libx265", options={"x265-params": f"{QUIET}:open-gop=1"}),
    Kind("mpeg4.avi", "mpeg4"),
    *(Kind(f"mpeg4-b{end}", "mpeg4", options={"bf": "2"}) for end in (".avi", ".mp4", ".mkv")),
    *(Kind(f"mpeg4{end}", "mpeg4") for end in (".ts", ".nut")),
    *(Kind(f"mpeg2{end}", "mpeg2video", options={"bf": "2"}, rate=25) for end in (".mpg", ".ts")),
    *(Kind(f"mpeg2{end}", "mpeg2video", options={"bf": "2"}, rate=25) for end in (".mxf", ".m2v")),
    Kind("interlaced.vob", "mpeg2video", options=INTERLACED, rate=25),
    Kind("mpeg1.mpg", "mpeg1video", options={"bf": "2"}, rate=25),
    *(Kind(f"vp8{end}", "libvpx", options=ALT) for end in (".webm", ".ivf", ".ogg")),
    *(Kind(f"vp9{end}", "libvpx-vp9", options=ALT) for end in (".webm", ".mp4", ".ivf")),
    *(Kind(f"av1{end}", "libsvtav1", options={"preset": "12"}) for end in (".mp4", ".mkv", ".obu")),
    *(Kind(f"mjpeg{end}", "mjpeg", pixels="yuvj420p") for end in (".avi", ".mov", ".mjpeg")),
    Kind("prores.mov", "prores_ks", pixels="yuv422p10le"),
    Kind("jpeg2000.mxf", "jpeg2000", rate=25),
    Kind("ffv1.mkv", "ffv1"),
    Kind("huffyuv.avi", "huffyuv", pixels="yuv422p"),
    Kind("raw.nut", "rawvideo"),
    Kind("raw.y4m", "wrapped_avframe"),
    Kind("flv1.flv", "flv"),
    Kind("h263.avi", "h263p"),
    Kind("h261.avi", "h261", size=CIF),
    Kind("wmv2.wmv", "wmv2"),
    Kind("rv20.rm", "rv20", size=CIF),
    Kind("shown.gif", "gif", pixels="rgb8"),
    Kind("shown.apng", "apng", pixels="rgb24"),
    Kind("svq1.mov", "svq1", pixels="yuv410p"),
]


def _pixels(images: Any) -> list[bytes]:
    return [image.tobytes() for image in images]


def _compare(path: Path, expected: list[Any] | None = None) -> None:
    """All frames, what three ranks decode of a choice, and single ones: each as decoded plainly."""
    truth = _pixels(plain(path) if expected is None else expected)
    video = probe(str(path))
    assert len(video) == len(truth), f"{path.name}: {len(video)} frames of {len(truth)}"
    assert all(a < b for a, b in zip(video.timestamps, video.timestamps[1:], strict=False))
    assert _pixels(decode(video, range(len(video)))) == truth, f"{path.name}: all frames"
    chosen = choose(video, count=7)
    for mine in (chosen[:3], chosen[3:4], chosen[4:], (len(truth) // 2, len(truth) - 1)):
        assert _pixels(decode(video, mine)) == [truth[n] for n in mine], f"{path.name}: {mine}"


def test_the_kinds_are_many() -> None:
    assert len({kind.codec for kind in KINDS}) >= 17
    assert len({Path(kind.name).suffix for kind in KINDS}) >= 16


def _marked() -> Iterator[Any]:
    """Every codec, container and way of muxing once; what combines them otherwise, exhaustive."""
    met: set[str] = set()
    for kind in KINDS:
        name = Path(kind.name)
        new = {name.stem, name.suffix} - met
        met |= new
        marks = [] if new else [pytest.mark.exhaustive]
        yield pytest.param(kind, id=kind.name, marks=marks)


@pytest.mark.parametrize("kind", _marked())
def test_frames_are_those_of_a_plain_decoder(tmp_path: Path, kind: Kind) -> None:
    path = write(tmp_path, kind)
    _compare(path)
    video = probe(str(path))
    assert len(video) == FRAMES
    if kind.times is None and path.suffix not in BARE:
        assert choose(video, fps=1) == tuple(range(0, FRAMES, kind.rate))


def _without_times(index: int, packet: Any) -> Any:
    """Shown when decoded, as containers without times of display have it."""
    packet.pts = packet.dts = index * 1024
    return packet


def _hidden(index: int, packet: Any) -> Any:
    """Two frames of VP8 that are decoded and not shown, as alternative references are."""
    data = bytearray(bytes(packet))
    if index in (18, 20):
        data[0] &= ~0x10
    changed = av.Packet(bytes(data))
    changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
    changed.is_keyframe = packet.is_keyframe
    return changed


def _all_keyframes(index: int, packet: Any) -> Any:
    packet.is_keyframe = True
    return packet


def _from_the_middle(index: int, packet: Any) -> Any:
    return packet if index >= 4 else None


def _remuxed(folder: Path, how: str) -> Path:
    source = write(folder, Kind("source.mp4", "libx264", options=B))
    if how == "b-frames-without-times.mp4":
        return remux(source, folder / how, change=_without_times)
    if how.startswith("begins-between"):
        return remux(source, folder / how, change=_from_the_middle)
    if how.startswith("hidden"):
        return remux(write(folder, Kind("a.webm", "libvpx")), folder / how, change=_hidden)
    if how == "overlapping.ts":
        # The second half begins before the first one ends, and between its frames.
        halves = [
            write(
                folder,
                Kind(f"{first}.ts", "libx264", rate=20, times=lambda n, at=first: 2 * n + at),
            )
            for first in (0, 41)
        ]
        (folder / how).write_bytes(b"".join(half.read_bytes() for half in halves))
        return folder / how
    if how == "wrong-keyframes.mp4":
        source = write(folder, Kind("mpeg4.mp4", "mpeg4"))
        return remux(source, folder / how, change=_all_keyframes)
    if how == "joined.ts":
        half = write(folder, Kind("half.ts", "libx264", options=B))
        (folder / how).write_bytes(half.read_bytes() * 2)
        return folder / how
    if how == "joined.h264":  # and the second half of another size
        halves = [
            write(folder, Kind(f"{width}.h264", "libx264", options=B, size=(width, 48)))
            for width in (64, 80)
        ]
        (folder / how).write_bytes(b"".join(half.read_bytes() for half in halves))
        return folder / how
    if how == "edit-list.mp4":
        # The muxer writes an edit that leaves out what has negative times: four frames.
        options = {"avoid_negative_ts": "disabled"}

        def earlier(_: int, packet: Any) -> Any:
            packet.pts -= 4 * 1024
            packet.dts -= 4 * 1024
            return packet

        return remux(source, folder / how, change=earlier, options=options)
    raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "frames"),
    [
        ("b-frames-without-times.mp4", FRAMES),
        ("begins-between-keyframes.mp4", FRAMES - GOP),
        ("begins-between-keyframes.mkv", FRAMES - GOP),
        ("begins-between-keyframes.ts", FRAMES - GOP),
        ("hidden.webm", FRAMES - 2),
        ("hidden.ivf", FRAMES - 2),
        ("joined.ts", 2 * FRAMES),
        ("overlapping.ts", 2 * FRAMES),
        ("wrong-keyframes.mp4", FRAMES),
        ("joined.h264", 2 * FRAMES),
        ("edit-list.mp4", FRAMES - 4),
    ],
)
def test_times_and_beginnings_that_mislead(tmp_path: Path, how: str, frames: int) -> None:
    path = _remuxed(tmp_path, how)
    _compare(path)
    video = probe(str(path))
    assert len(video) == frames
    if how.startswith("hidden"):
        return
    # A frame a second of the ten, whatever the packets bear; a bare stream counts as 25 a second.
    rate = 25 if path.suffix == ".h264" else 10
    assert choose(video, fps=1) == tuple(range(0, frames, rate))


# How FFmpeg's players turn a picture by the four numbers of its display matrix.
TURNS: dict[tuple[int, int, int, int], Callable[[Any], Any]] = {
    (1, 0, 0, 1): lambda p: p,
    (-1, 0, 0, 1): lambda p: p[:, ::-1],
    (1, 0, 0, -1): lambda p: p[::-1],
    (-1, 0, 0, -1): lambda p: p[::-1, ::-1],
    (0, 1, -1, 0): lambda p: np.rot90(p, -1),
    (0, -1, 1, 0): lambda p: np.rot90(p, 1),
    (0, 1, 1, 0): lambda p: p.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda p: np.rot90(p, 2).transpose(1, 0, 2),
}


def _matrix(a: int, b: int, c: int, d: int) -> list[int]:
    return [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]


@pytest.mark.parametrize("matrix", TURNS)
def test_display_matrices(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    path = write(
        tmp_path,
        Kind(
            "a.mp4",
            "libx264",
            options=B,
            setup=lambda stream: stream.set_display_matrix(_matrix(*matrix)),
        ),
    )
    turned = [Image.fromarray(TURNS[matrix](np.asarray(image)).copy()) for image in plain(path)]
    _compare(path, turned)


def test_a_matrix_of_no_right_angle_is_refused(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        Kind("a.mp4", "libx264", setup=lambda stream: stream.set_display_rotation(30)),
    )
    with pytest.raises(ValueError, match=r"a\.mp4: .*a picture to be turned"):
        next(decode(probe(str(path)), [0]))


@pytest.mark.parametrize(
    ("aspect", "size"), [(Fraction(64, 45), (91, 48)), (Fraction(1, 2), (64, 96))]
)
@pytest.mark.parametrize("end", [".mp4", ".mkv", ".ts"])
def test_pixels_are_made_square(
    tmp_path: Path, end: str, aspect: Fraction, size: tuple[int, int]
) -> None:
    def setup(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = aspect

    path = write(tmp_path, Kind(f"a{end}", "libx264", options=B, setup=setup))
    shown = next(decode(probe(str(path)), [5]))
    assert shown.size == size
    whole = plain(path)[5].resize(size, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(shown, int) - np.asarray(whole, int)).mean() < 4


def test_the_default_stream_is_taken_and_never_a_cover(tmp_path: Path) -> None:
    first = write(tmp_path, Kind("first.mp4", "libx264", options=B))
    second = write(tmp_path, Kind("second.mp4", "libx264", options=B, size=(80, 48)))
    path = tmp_path / "both.mkv"
    with av.open(str(first)) as one, av.open(str(second)) as two, av.open(str(path), "w") as out:
        copies = [out.add_stream_from_template(each.streams.video[0]) for each in (one, two)]
        kinds = type(copies[0].disposition)
        copies[0].disposition = kinds(0)
        copies[1].disposition = kinds.default
        for copy, source in zip(copies, (one, two), strict=True):
            for packet in source.demux(video=0):
                if packet.size > 0:
                    packet.stream = copy
                    out.mux(packet)
    video = probe(str(path))
    assert (video.width, len(video)) == (80, FRAMES)
    assert _pixels(decode(video, [3, 20])) == [_pixels(plain(second))[n] for n in (3, 20)]


def test_what_is_transparent_shows_white(tmp_path: Path) -> None:
    def draw(frame: Any) -> None:
        plane = np.frombuffer(frame.planes[0], np.uint8).reshape(HEIGHT, -1)
        plane = plane.copy()
        plane[:, 3 : 4 * WIDTH // 2 : 4] = 0  # alpha of the left half
        frame.planes[0].update(plane.tobytes())

    kind = Kind("a.mov", "png", pixels="rgba", draw=draw, source="rgba")
    image = np.asarray(next(decode(probe(str(write(tmp_path, kind))), [7])))
    assert (image[:, : WIDTH // 2] == 255).all()
    np.testing.assert_array_equal(image[:, WIDTH // 2 :], drawing(7)[:, WIDTH // 2 :])


def test_no_more_than_the_frames_of_a_run_are_decoded(tmp_path: Path) -> None:
    video = probe(str(write(tmp_path, Kind("a.mp4", "libx264", options=B))))
    counter = DecodeCount()
    list(decode(video, [2, 18], counter=counter))
    assert counter.frames == 3 + 3  # 0 to 2, and 16 to 18
