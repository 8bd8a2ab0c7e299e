"""Films and images with damage of every sort: each is decoded, or refused with its name and a cure.

    python -m tests.data.fuzz --seed 3 --seconds 3600

A case is a seed and a number, so that one that fails comes again: ``--seed 3 --only 1234``; the
damaged file is left in ``--keep FOLDER``. Cases run in a process of their own, with a limit of
memory; one that dies, or that is at a case for a minute, is a failure as any other.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from PIL import Image

from ds_lvx.data.frames import choose, decode, probe
from ds_lvx.data.images import load_image
from ds_lvx.data.limits import Limits
from tests.data.films import Kind, drawing, write

HANG_S = 60.0
MEMORY_BYTES = 3 << 30
LIMITS = Limits(max_pixels=4_000_000, max_film_frames=100_000, max_lead_in_frames=2_000)
B = {"bf": "2", "preset": "ultrafast"}
FILMS = (
    *(Kind(f"h264.{end}", "libx264", options=B) for end in ("mp4", "mkv", "ts", "avi", "flv")),
    Kind("h264.h264", "libx264", options=B),
    Kind("fast.mov", "libx264", options=B, muxing={"movflags": "faststart"}),
    Kind("pieces.mp4", "libx264", options=B, muxing={"movflags": "frag_keyframe+empty_moov"}),
    Kind("hevc.mp4", "libx265", options={"x265-params": "log-level=none"}),
    Kind("mpeg4.avi", "mpeg4", options={"bf": "2"}),
    Kind("mpeg2.mpg", "mpeg2video", options={"bf": "2"}, rate=25),
    Kind("vp8.webm", "libvpx"),
    Kind("vp9.webm", "libvpx-vp9", options={"cpu-used": "8"}),
    Kind("mjpeg.avi", "mjpeg", pixels="yuvj420p"),
    Kind("shown.gif", "gif", pixels="rgb8"),
    Kind("wmv2.wmv", "wmv2"),
    Kind("vp8.ogg", "libvpx"),
)
IMAGES = ("png", "jpg", "webp", "gif", "bmp", "tif", "jp2", "ppm", "tga", "pcx", "ico", "qoi")
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@dataclass(frozen=True)
class Failure:
    """What went wrong in a case."""

    seed: int
    number: int
    name: str
    what: str

    def __str__(self) -> str:
        return f"--seed {self.seed} --only {self.number} ({self.name}): {self.what}"


def originals(folder: Path) -> list[Path]:
    """Whole films and images, from which cases are made."""
    paths = [write(folder, kind) for kind in FILMS]
    exif = Image.Exif()
    exif[0x0112] = 6
    for end in IMAGES:
        path = folder / f"image.{end}"
        options: dict[str, Any] = {"exif": exif} if end in ("jpg", "png", "webp", "tif") else {}
        Image.fromarray(drawing(5)).save(path, **options)
        paths.append(path)
    for end in ("png", "tif"):
        Image.fromarray(drawing(5)).convert("P").save(folder / f"palette.{end}")
        Image.fromarray(drawing(5)[..., 0].astype("uint16") * 257).save(folder / f"deep.{end}")
        paths += [folder / f"palette.{end}", folder / f"deep.{end}"]
    Image.fromarray(drawing(5)).convert("RGBA").save(folder / "alpha.png")
    return [*paths, folder / "alpha.png"]


def damage(data: bytes, chance: random.Random) -> bytes:
    """The file with one to three injuries."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        data = chance.choice((_bits, _range, _cut, _drop, _repeat, _number, _number, _header))(
            bytearray(data), chance
        )
    return data


def _bits(data: bytearray, chance: random.Random) -> bytes:
    for _ in range(chance.choice((1, 4, 30))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def _stretch(data: bytearray, chance: random.Random) -> tuple[int, int]:
    start = chance.randrange(len(data))
    return start, min(len(data), start + chance.choice((1, 16, 200, 2000)))


def _range(data: bytearray, chance: random.Random) -> bytes:
    start, end = _stretch(data, chance)
    data[start:end] = bytes(end - start) if chance.random() < 0.5 else chance.randbytes(end - start)
    return bytes(data)


def _cut(data: bytearray, chance: random.Random) -> bytes:
    return bytes(data[: chance.randrange(len(data)) + 1])


def _drop(data: bytearray, chance: random.Random) -> bytes:
    start, end = _stretch(data, chance)
    return bytes(data[:start] + data[end:]) or b"\0"


def _repeat(data: bytearray, chance: random.Random) -> bytes:
    start, end = _stretch(data, chance)
    return bytes(data[:end] + data[start:])


def _number(data: bytearray, chance: random.Random) -> bytes:
    """An extreme value where a number may stand, most often near an end, where headers are."""
    near = min(len(data), chance.choice((64, 1000, len(data))))
    place = chance.randrange(near)
    place = place if chance.random() < 0.6 else len(data) - 1 - place
    form = chance.choice("<>") + chance.choice("BHI")
    value = chance.choice(EXTREMES) % (1 << 8 * struct.calcsize(form))
    packed = struct.pack(form, value)[: len(data) - place]
    data[place : place + len(packed)] = packed
    return bytes(data)


def _header(data: bytearray, chance: random.Random) -> bytes:
    """Bits of the first bytes alone."""
    for _ in range(chance.choice((1, 3))):
        data[chance.randrange(min(len(data), 100))] ^= 1 << chance.randrange(8)
    return bytes(data)


def look(path: Path) -> str:
    """Decode a file, or have it refused; the answer says which.

    Raises:
        AssertionError: a refusal without the name, or without what was expected.
        Exception: whatever else the library lets through.
    """
    try:
        if path.name.startswith(("image", "palette", "deep", "alpha")):
            assert load_image(str(path), limits=LIMITS).mode == "RGB"
        else:
            return _look_at_film(path)
    except ValueError as error:
        text = str(error)
        assert text.startswith(f"{path}: "), f"a refusal without the name: {text}"
        assert not text.startswith(f"{path}: {path}"), f"a refusal with the name twice: {text}"
        assert " expected " in text, f"a refusal without what was expected: {text}"
        return "refused"
    return "decoded"


def _look_at_film(path: Path) -> str:
    """Frames together, and each by itself: the same, but for damage that no decoder notices.

    What a damaged picture refers to may be another one when decoding began elsewhere, and FFmpeg's
    VP8 (62.28) shows what lay in memory where damaged vectors point.
    """
    video = probe(str(path), limits=LIMITS)
    chosen = choose(video, fps=2, max_frames=5)
    together = [image.tobytes() for image in decode(video, chosen, limits=LIMITS)]
    for index, expected in zip(chosen, together, strict=True):
        alone = next(decode(video, [index], limits=LIMITS)).tobytes()
        same = alone == expected
        if not same:
            return "differs"
    return "decoded"


def _work(pipe: Connection, paths: list[Path], folder: Path, seed: int) -> None:
    """In the child: a number comes, what became of the case goes back."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    whole = [path.read_bytes() for path in paths]
    pipe.send("ready")
    while True:
        number = pipe.recv()
        if number is None:
            return
        chance = random.Random(f"{seed} {number}")
        which = number % len(paths)
        path = folder / paths[which].name
        path.write_bytes(damage(whole[which], chance))
        try:
            pipe.send(look(path))
        except Exception:  # noqa: BLE001 what the library lets through is what is looked for
            pipe.send(f"failed\n{traceback.format_exc()}")


class _Child:
    """The process that looks at damaged files."""

    def __init__(self, paths: list[Path], folder: Path, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(theirs, paths, folder, seed), daemon=True
        )
        self._process.start()
        theirs.close()
        self._pipe.recv()  # when it has imported everything

    def ask(self, number: int) -> str:
        self._pipe.send(number)
        try:
            if self._pipe.poll(HANG_S):
                return str(self._pipe.recv())
            self.end()
            return f"failed: nothing for {HANG_S:.0f} s"
        except (EOFError, OSError):
            self._process.join()
            return f"failed: the process died with exit code {self._process.exitcode}"

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def fuzz(
    numbers: Iterable[int], *, seed: int, keep: Path | None = None
) -> Iterator[tuple[str, Failure | None]]:
    """Run cases; yields what became of each: "decoded", "refused", "differs" (from what
    is decoded by itself, without a word of the decoder), or "failed" and how.

    Args:
        numbers: of the cases.
        seed: of all of them.
        keep: folder for the files of failed cases.
    """
    with tempfile.TemporaryDirectory() as name:
        whole, damaged = Path(name) / "whole", Path(name) / "damaged"
        whole.mkdir()
        damaged.mkdir()
        paths = originals(whole)
        child = _Child(paths, damaged, seed)
        try:
            for number in numbers:
                if not child.alive:
                    child = _Child(paths, damaged, seed)
                answer = child.ask(number)
                path = damaged / paths[number % len(paths)].name
                if not answer.startswith("failed"):
                    yield answer, None
                    continue
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{seed}-{number}-{path.name}").write_bytes(path.read_bytes())
                yield "failed", Failure(seed, number, path.name, answer)
        finally:
            child.end()


def _until(end: float) -> Iterator[int]:
    for number in count():
        if time.monotonic() > end:
            return
        yield number


def main() -> int:
    """The command; returns 1 where a case failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", type=int, help="number of one case")
    parser.add_argument("--keep", type=Path, help="folder for the files of failed cases")
    options = parser.parse_args()
    numbers = _until(time.monotonic() + options.seconds) if options.only is None else [options.only]
    ends: dict[str, int] = dict.fromkeys(("decoded", "refused", "differs", "failed"), 0)
    for end, failure in fuzz(numbers, seed=options.seed, keep=options.keep):
        ends[end] += 1
        if failure is not None:
            print(failure, flush=True)
    print(", ".join(f"{number} {end}" for end, number in ends.items()))
    return int(ends["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
