"""A seeded fuzzer of lines of data: each is read, or refused with file and line, and nothing else.

    python -m tests.data.fuzz_lines --seconds 600 --seed 7

What it finds it prints with the seed that makes it again.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_lvx.data.batch import BatchMaker, FrameRate
from ds_lvx.data.chat import Chats
from ds_lvx.data.errors import DataError
from ds_lvx.data.text import TextEncoder
from ds_lvx.models import FAMILIES
from ds_lvx.models.mllama.tiny import tiny_processor
from tests.data.media import write_image, write_video

SEEDS: tuple[dict[str, Any], ...] = (
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "video", "video": "a.mp4", "fps": 5},
                    {"type": "image", "image": "a.png"},
                    {"type": "text", "text": "Où? \U0001f600"},
                ],
            },
            {"role": "assistant", "content": "There.", "weight": 0},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": " Here. "},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "<image>What?<video>"},
            {"role": "assistant", "content": [{"type": "text", "text": "A rabbit."}]},
        ],
        "images": ["a.png"],
        "videos": ["a.mp4"],
        "id": 7,
    },
)
WORDS = (
    *("", " ", "user", "assistant", "system", "text", "image", "video", "<image>", "<video>"),
    *("a.png", "a.mp4", "no.png", ".", "/", "file:///", "file://x/a", "data:image/png;base64,AAAA"),
    *("http://a/b.png", "a\0b", "\ud83d", "\U0001f600", "<|image|>", "<|eot_id|>", "{{ x }}", "\r"),
    *("x" * 5000, "../" * 2000, "lvx0answer0mark", "[{'type': 'text'}]", "%00", "file:%00"),
)
NUMBERS = (0, 1, -1, 2, 0.5, 1e-320, 1e308, float("inf"), float("nan"), 10**40, 2**63, True, False)
KEYS = (
    *("role", "content", "type", "text", "image", "video", "images", "videos", "messages"),
    *("weight", "fps", "nframes", "literal", "system", "tools", "name", "\ud83d", "x" * 999),
)


def value(chance: random.Random, depth: int = 0) -> Any:
    """Any JSON, of the words that the format knows and of others."""
    kinds: list[Callable[[], Any]] = [
        lambda: chance.choice(WORDS),
        lambda: chance.choice(NUMBERS),
        lambda: None,
    ]
    if depth < 4:
        kinds += [
            lambda: [value(chance, depth + 1) for _ in range(chance.randrange(4))],
            lambda: {
                chance.choice(KEYS): value(chance, depth + 1) for _ in range(chance.randrange(4))
            },
        ]
    return chance.choice(kinds)()


def changed(chance: random.Random, given: Any) -> Any:
    """JSON with one value somewhere in it replaced, added, doubled or taken out."""
    if chance.random() < 0.2 or not isinstance(given, dict | list) or not given:
        return value(chance)
    if isinstance(given, dict):
        key = chance.choice(list(given))
        act = chance.randrange(8)
        if act == 0:
            return {k: v for k, v in given.items() if k != key}
        if act == 1:
            return {**given, chance.choice(KEYS): value(chance)}
        return {**given, key: changed(chance, given[key])}
    place, act = chance.randrange(len(given)), chance.randrange(8)
    if act == 0:
        return given[:place] + given[place + 1 :]
    if act == 1:
        return given[:place] + [given[place]] * chance.choice((2, 3, 50)) + given[place:]
    return [*given[:place], changed(chance, given[place]), *given[place + 1 :]]


def line(chance: random.Random) -> bytes:
    """A line near to a good one: its values changed, then perhaps its bytes."""
    record: Any = chance.choice(SEEDS)
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        record = changed(chance, record)
    raw = bytearray(json.dumps(record, ensure_ascii=chance.random() < 0.5).encode(**SURROGATES))
    act = chance.randrange(12)
    if act == 0:
        del raw[chance.randrange(len(raw) + 1) :]
    elif act == 1:
        for _ in range(chance.choice((1, 1, 2, 20))):
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    elif act == 2:
        place = chance.randrange(len(raw) + 1)
        raw[place:place] = chance.choice(
            (b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\xef\xbb\xbf", b"\0", b"\\ud800")
        )
    elif act == 3:
        start, end = sorted(chance.choices(range(len(raw) + 1), k=2))
        raw[end:end] = raw[start:end] * chance.choice((1, 2, 100))
    elif act == 4:
        raw = bytearray(bytes(raw).decode(**SURROGATES).encode("utf-16", "surrogatepass"))
    return bytes(raw).replace(b"\n", b" ")


SURROGATES: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogatepass"}


class Reader:
    """Reads lines as a run does before its model is loaded.

    Args:
        folder: for the media and the file of lines.
    """

    def __init__(self, folder: Path) -> None:
        write_image(folder / "a.png")
        write_video(folder / "a.mp4", frames=8)
        self.path = folder / "d.jsonl"
        encoder = TextEncoder(tiny_processor(), 500, family=FAMILIES.named("mllama"))
        self._maker = BatchMaker(encoder, FrameRate(count=2), owned=range)

    def read(self, raw: bytes) -> bool:
        """Whether the line is good. One that is not must be refused in few words, by its name.

        Raises:
            AssertionError: it is refused in another way.
        """
        self.path.write_bytes(raw + b"\n")
        try:
            chats = Chats(self.path)
            for index in range(len(chats)):
                self._maker.sample(chats[index])
        except DataError as error:
            words = str(error)
            places = (":1: ", ": got ", ", line 1, element ")
            assert words.startswith(tuple(f"{self.path}{place}" for place in places)), words
            assert len(words) < 2000, f"{len(words)} characters"
            assert words.encode()  # what cannot be printed or sent is no message
            return False
        return True


def fuzz(reader: Reader, seed: int) -> bool:
    """One line by its seed; whether it is good.

    Raises:
        AssertionError: it is neither read nor refused as it should be; says which line.
    """
    raw = line(random.Random(seed))
    try:
        return reader.read(raw)
    except Exception as error:
        raise AssertionError(f"seed {seed}: {raw[:300]!r} ({len(raw)} bytes)") from error


def main() -> None:
    """Fuzz for a while, from a seed on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    seed, until = options.seed, time.monotonic() + options.seconds
    good = 0
    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(Path(folder))
        while time.monotonic() < until:
            good += fuzz(reader, seed)
            seed += 1
    print(f"seeds {options.seed} to {seed - 1}: {good} read, the others refused by file and line")


if __name__ == "__main__":
    main()
