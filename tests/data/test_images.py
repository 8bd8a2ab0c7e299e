"""Images as they are shown: transparency, depth, turns; and what is no single picture."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ds_lvx.data.chosen import Chooser, FrameRate
from ds_lvx.data.conversation import Part
from ds_lvx.data.images import image_sides, load_image
from ds_lvx.data.limits import Limits


def _save(path: Path, pixels: Any, mode: str | None = None, **options: Any) -> str:
    image = Image.fromarray(pixels) if mode is None else Image.fromarray(pixels).convert(mode)
    image.save(path, **options)
    return str(path)


def _glyph() -> tuple[Any, Any]:
    """A black glyph on transparent black; and what is to be seen."""
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[2:6, 3:5, 3] = 255
    shown = np.full((8, 8, 3), 255, np.uint8)
    shown[2:6, 3:5] = 0
    return rgba, shown


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("end", ["png", "tif", "webp"])
def test_what_is_transparent_shows_white(tmp_path: Path, mode: str, end: str) -> None:
    rgba, shown = _glyph()
    options: Any = {"lossless": True} if end == "webp" else {}
    Image.fromarray(rgba).convert(mode).save(tmp_path / f"a.{end}", **options)
    np.testing.assert_array_equal(np.asarray(load_image(str(tmp_path / f"a.{end}"))), shown)


@pytest.mark.parametrize("mode", ["P", "L", "1", "RGB"])
def test_a_transparent_colour_shows_white(tmp_path: Path, mode: str) -> None:
    _, shown = _glyph()
    # Black is transparent, dark grey or white is the glyph.
    value = 255 if mode == "1" else 30
    grey = np.where(shown[..., 0] == 0, value, 0).astype(np.uint8)
    image = Image.fromarray(grey).convert(mode)
    transparent: Any = (0, 0, 0) if mode == "RGB" else 0
    image.save(tmp_path / "a.png", transparency=transparent)
    expected = np.where(shown == 0, value, 255)
    np.testing.assert_array_equal(np.asarray(load_image(str(tmp_path / "a.png"))), expected)


def test_half_transparent_is_mixed_with_white(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.png", np.full((2, 2, 4), (200, 100, 0, 128), np.uint8))
    assert load_image(path).getpixel((0, 0)) == (227, 177, 127)


@pytest.mark.parametrize("end", ["png", "tif", "pgm", "jp2"])
def test_sixteen_bits_are_scaled(tmp_path: Path, end: str) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    options = {"irreversible": False} if end == "jp2" else {}
    found = np.asarray(load_image(_save(tmp_path / f"a.{end}", ramp, **options)))
    expected = np.round(ramp / 257).astype(np.uint8)
    np.testing.assert_array_equal(found, np.repeat(expected[..., None], 3, axis=2))


def test_sixteen_bits_with_a_transparent_level(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    path = _save(tmp_path / "a.png", ramp, transparency=512)
    found = np.asarray(load_image(path))[..., 0].ravel().tolist()
    assert found[:4] == [0, 1, 255, 3]


@pytest.mark.parametrize(("kind", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_numbers_without_a_scale_are_refused(tmp_path: Path, kind: Any, mode: str) -> None:
    path = _save(tmp_path / "a.tif", np.arange(12).reshape(3, 4).astype(kind))
    with pytest.raises(ValueError, match=rf"a\.tif: got pixels of mode {mode}; expected 8 or 16"):
        load_image(path)


def test_sixteen_bits_from_white_to_black_are_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.tif", np.zeros((4, 4), np.uint16), tiffinfo={262: 0})
    with pytest.raises(ValueError, match="photometric 0"):
        load_image(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("end", ["jpg", "png", "webp", "tif"])
def test_eight_orientations(tmp_path: Path, orientation: int, end: str) -> None:
    x, y = np.arange(32), np.arange(16)[:, None]
    pixels = np.stack([8 * x + 0 * y, 16 * y + 0 * x, 0 * x + 0 * y], axis=2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _save(tmp_path / f"a.{end}", pixels, exif=exif)
    turns = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: np.rot90(pixels, 2).transpose(1, 0, 2),
        8: np.rot90(pixels, 1),
    }
    found = np.asarray(load_image(path))
    assert found.shape == turns[orientation].shape
    assert image_sides(path) == found.shape[:2]  # which the header alone tells
    assert np.abs(found.astype(int) - turns[orientation]).mean() < 12


@pytest.mark.parametrize("end", ["gif", "png", "webp", "tif"])
def test_several_pictures_in_a_file_are_refused(tmp_path: Path, end: str) -> None:
    pages = [Image.new("RGB", (8, 8), (n, 0, 0)) for n in (0, 100, 200)]
    pages[0].save(tmp_path / f"a.{end}", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match=rf"a\.{end}: got 3 pictures in one file"):
        load_image(str(tmp_path / f"a.{end}"))


def test_a_photograph_with_a_preview_is_the_photograph(tmp_path: Path) -> None:
    photograph, preview = Image.new("RGB", (32, 16), "red"), Image.new("RGB", (8, 4), "blue")
    photograph.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[preview])
    assert load_image(str(tmp_path / "a.jpg")).size == (32, 16)


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "RGB"])
def test_modes_without_alpha(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (16, 16), "white").convert(mode)
    image.save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    found = load_image(str(next(tmp_path.iterdir())))
    assert (found.mode, found.getpixel((3, 3))) == ("RGB", (255, 255, 255))


def test_no_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools, started = tmp_path / "bin", tmp_path / "started"
    tools.mkdir()
    script = tools / "gs"
    script.write_text(f"#!/bin/sh\ntouch {started}\n")
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    path = tmp_path / "x.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"x\.png: .*expected an image \(AVIF, BMP"):
        load_image(str(path))
    assert not started.exists()


def test_halves_and_limits(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    for end in ("png", "jpg", "gif", "bmp", "tif", "webp"):
        path = tmp_path / f"a.{end}"
        _save(path, noise)
        with pytest.raises(ValueError, match=r"2,000 pixels; expected at most 1,999.*--max_pixels"):
            load_image(str(path), limits=Limits(max_pixels=1999))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=rf"a\.{end}: got a file that cannot be decoded"):
            load_image(str(path))


@pytest.mark.parametrize(("package", "name"), [("PIL", "a.png"), ("av", "a.mp4")])
def test_a_package_that_is_missing_is_named_with_the_line(
    package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).touch()
    part = Part("image" if name.endswith("png") else "video", str(tmp_path / name))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{name}: got no package '{package}'.*ds_lvx\[video\]"):
        Chooser(FrameRate(fps=1), sized=True).frames(part)
