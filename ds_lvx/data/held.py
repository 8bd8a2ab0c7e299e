"""Media that have no file of their own: bytes in a table, a member of a tar archive, a data: URL;
and videos that have many, one a frame.

Images are read from memory. A film is written to a file of its own for as long as it is in use,
since decoders want to go back and forth in it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote_to_bytes

STILLS_FPS = 2.0
"""Of a list of frames that says nothing, as the readers of other trainers take it."""
_FILMS = 64
"""Files of films that are kept at once; every epoch comes back to the same ones."""


@dataclass(frozen=True)
class Held:
    """Bytes of an image or a film within another file.

    Attributes:
        name: what messages call it.
        key: what changes when the bytes do.
        read: the bytes.
    """

    name: str
    key: str
    read: Callable[[], bytes] = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.name

    @classmethod
    def of(cls, name: str, data: bytes, read: Callable[[], bytes] | None = None) -> Held:
        """Of bytes at hand, which are kept unless ``read`` gets them again."""
        key = hashlib.sha256(data).hexdigest()[:32]
        return cls(name, key, (lambda: data) if read is None else read)


@dataclass(frozen=True)
class Stills:
    """A video whose frames are images of their own.

    Attributes:
        files: of each frame, in their order.
        fps: frames a second that they were taken at.
    """

    files: tuple[str | Held, ...]
    fps: float = STILLS_FPS

    def __str__(self) -> str:
        more = len(self.files) - 1
        return f"{self.files[0]}" + (f" and {more} more frames" if more else "")


def of_data_url(url: str) -> Held:
    """The bytes that a ``data:`` URL holds.

    Raises:
        ValueError: it holds none; says what is wrong.
    """
    head, comma, body = url.partition(",")
    if not comma:
        raise ValueError("no comma before the data")
    try:
        if head.endswith(";base64"):
            data = base64.b64decode("".join(unquote_to_bytes(body).decode("ascii").split()))
        else:
            data = unquote_to_bytes(body)
    except (binascii.Error, UnicodeDecodeError) as error:
        raise ValueError(f"base64 that cannot be decoded ({error})") from None
    if not data:
        raise ValueError("no data")
    return Held.of(f"{head}, of {len(data):,} bytes", data)


class Films:
    """Files for films that are held within other files, the latest so many of them."""

    def __init__(self, most: int = _FILMS) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._most = most
        self._written: OrderedDict[Held, Path] = OrderedDict()

    def path(self, held: Held) -> str:
        """Where its bytes are now; a later call may put them there again.

        Raises:
            OSError: there is no room for them.
        """
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="ds_lvx-films-")
        path = Path(self._folder.name) / hashlib.sha256(repr(held).encode()).hexdigest()[:32]
        if held not in self._written:
            path.write_bytes(held.read())
        self._written[held] = path
        self._written.move_to_end(held)
        while len(self._written) > self._most:
            _, oldest = self._written.popitem(last=False)
            oldest.unlink(missing_ok=True)
        return str(path)
