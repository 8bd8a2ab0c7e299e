from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ds_lvx.data.frames import DecodeCount, choose, decode, probe
from ds_lvx.data.images import load_image
from tests.data.media import BUNNY, write_image, write_png_header, write_video


def _grey(image: Any) -> float:
    return image.getpixel((5, 5))[0] / 6


def test_probe_reads_times_and_size() -> None:
    video = probe(str(BUNNY))
    assert len(video) == 132
    assert (video.width, video.height) == (1280, 720)
    assert video.keyframes == (0,)
    assert video.seconds(131) == pytest.approx(131 / 25)


@pytest.mark.slow
def test_two_ranks_decode_all_132_frames_and_stop_after_their_last() -> None:
    video = probe(str(BUNNY))
    decoded, pictures = [], []
    for mine in (range(66), range(66, 132)):
        counter = DecodeCount()
        pictures.append([picture.size for picture in decode(video, mine, counter=counter)])
        decoded.append(counter.frames)
    assert [len(part) for part in pictures] == [66, 66]
    # The file has one keyframe, its first frame: the second rank's lead-in is the first half.
    assert decoded == [66, 132]
    assert set(pictures[0] + pictures[1]) == {(1280, 720)}


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_decoding_begins_at_the_keyframe_before_each_wanted_frame(
    tmp_path: Path, name: str
) -> None:
    video = probe(str(write_video(tmp_path / name)))
    assert len(video) == 40
    assert len(video.keyframes) == 4
    everything = [_grey(picture) for picture in decode(video, range(40))]
    assert everything == pytest.approx(list(range(40)), abs=0.5)

    counter = DecodeCount()
    some = [_grey(picture) for picture in decode(video, [13, 14, 37], counter=counter)]
    assert some == [everything[13], everything[14], everything[37]]
    assert counter.frames == 5 + 8  # 10 to 14, then 30 to 37: what lies between is never read


def test_containers_that_seek_too_far_are_asked_again(tmp_path: Path) -> None:
    video = probe(str(write_video(tmp_path / "a.avi", codec="mpeg4")))
    everything = [_grey(picture) for picture in decode(video, range(len(video)))]
    assert everything == pytest.approx(list(range(40)), abs=1)
    assert [_grey(picture) for picture in decode(video, [0, 21])] == [everything[0], everything[21]]


def test_choosing_frames(tmp_path: Path) -> None:
    video = probe(str(BUNNY))
    assert choose(video) == tuple(range(132))
    assert choose(video, fps=25) == tuple(range(132))
    assert choose(video, fps=100) == tuple(range(132))
    assert choose(video, fps=1) == (0, 25, 50, 75, 100, 125)
    assert choose(video, fps=0.1) == (0,)
    assert choose(video, count=3) == (22, 66, 110)
    assert choose(video, count=132) == choose(video, count=500) == tuple(range(132))
    # A frame a second, at most N, is what N frames of those are; of a film that has no more, all.
    assert choose(video, fps=1, max_frames=6) == choose(video, fps=1)
    assert choose(video, fps=1, max_frames=3) == (25, 75, 125)
    assert choose(video, fps=1, max_frames=1) == (75,)
    assert choose(video, max_frames=3) == choose(video, count=3)
    for wrong in (
        *({"fps": 0}, {"count": 0}, {"fps": 1, "count": 1}, {"fps": math.inf}),
        *({"fps": math.nan}, {"fps": 1, "max_frames": 0}, {"count": 3, "max_frames": 3}),
    ):
        with pytest.raises(ValueError, match="expected"):
            choose(video, **wrong)


def test_a_rotated_video_comes_upright(tmp_path: Path) -> None:
    # As a phone held upright writes it: "turn a quarter clockwise" in the track's header.
    data = bytearray(BUNNY.read_bytes())
    one, place = 1 << 16, data.index(b"tkhd") + 44
    matrix = struct.pack(">9i", 0, one, 0, -one, 0, 0, 720 * one, 0, 1 << 30)
    data[place : place + len(matrix)] = matrix
    (tmp_path / "phone.mp4").write_bytes(data)
    upright = next(decode(probe(str(tmp_path / "phone.mp4")), [0]))
    lying = next(decode(probe(str(BUNNY)), [0]))
    assert upright.size == (720, 1280)
    assert upright.tobytes() == lying.transpose(Image.Transpose.ROTATE_270).tobytes()


def _decode_all(path: str) -> None:
    video = probe(path)
    list(decode(video, range(len(video))))


def _bad_files(folder: Path) -> dict[str, Path]:
    whole = BUNNY.read_bytes()
    damaged = bytearray(whole)
    damaged[400_000:800_000] = bytes(7 * n % 256 for n in range(400_000))
    files = {name: folder / name for name in ("cut.mp4", "damaged.mp4", "text.mp4", "a.txt")}
    files["cut.mp4"].write_bytes(whole[:300_000])
    files["damaged.mp4"].write_bytes(damaged)
    files["text.mp4"].write_text("hello\n" * 100)
    files["a.txt"].write_text("hello\n" * 100)
    (folder / "empty.mp4").touch()
    files["empty.mp4"] = folder / "empty.mp4"
    files["image.mp4"] = write_image(folder / "a.png").rename(folder / "image.mp4")
    files["none.mp4"] = folder / "none.mp4"
    return files


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cut.mp4", "cannot be decoded"),
        ("damaged.mp4", "cannot be decoded|no frame at"),
        ("text.mp4", "cannot be decoded"),
        ("a.txt", r"picture or text \(tty\)"),
        ("empty.mp4", "cannot be decoded"),
        ("image.mp4", "give a picture as"),
        ("none.mp4", "no such file"),
    ],
)
def test_files_that_are_no_good_video(tmp_path: Path, name: str, expected: str) -> None:
    path = _bad_files(tmp_path)[name]
    with pytest.raises(ValueError, match=expected) as caught:
        _decode_all(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images(tmp_path: Path) -> None:
    assert load_image(str(write_image(tmp_path / "a.png"))).size == (50, 40)
    huge = write_png_header(tmp_path / "huge.png", 40_000, 25_000)
    with pytest.raises(ValueError, match=r"huge\.png: .*1,000,000,000 pixels"):
        load_image(str(huge))
    large = write_png_header(tmp_path / "large.png", 10_000, 10_000)
    with pytest.raises(ValueError, match=r"large\.png: .*100,000,000 pixels"):
        load_image(str(large))
    broken = tmp_path / "broken.png"
    broken.write_bytes((tmp_path / "a.png").read_bytes()[:60])
    for path in (broken, BUNNY, tmp_path / "none.png"):
        with pytest.raises(ValueError, match="expected an image"):
            load_image(str(path))
