"""What every kind of data file offers: its records, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ds_lvx.data.errors import Source


class Records(Protocol):
    """Samples as their file has them. Pickles."""

    @property
    def path(self) -> str:
        """Of the file or folder, as given."""

    @property
    def sha256(self) -> str:
        """Of what tells whether the records are the same."""

    @property
    def folder(self) -> str:
        """That relative paths of media begin in."""

    def __len__(self) -> int: ...

    def source(self, index: int) -> Source:
        """Where a record stands."""

    def raw(self, index: int) -> bytes:
        """What changes when a record does."""

    def record(self, index: int) -> dict[str, Any]:
        """A record; what the file holds of images and videos is `ds_lvx.data.held.Held`."""

    def blocks(self, kept: Sequence[int]) -> tuple[int, ...]:
        """How many of the records ``kept`` lie together in a file, in their order."""
