"""Rows of a Hugging Face data set: what `datasets` saved, parquet files, arrow files.

`datasets` maps them into memory; a row is taken as it is stored, so that the bytes of its images
stay bytes until somebody looks at them. Rows are counted from 0, as in ``dataset[7]``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ds_lvx.data.errors import DataError, Source
from ds_lvx.data.held import Held

TABLES = (".parquet", ".arrow")
SAVED = ("state.json", "dataset_dict.json")
"""What `datasets` leaves in a folder: of a data set, of several splits."""
_TAIL_BYTES = 1 << 16
"""In which a file of rows says where they are."""


class Table:
    """The rows of a data set.

    Args:
        path: a folder that ``save_to_disk`` wrote, a file of `TABLES`, or a folder of these.

    Attributes:
        path: as given.
        sha256: of the names, sizes and ends of its files.

    Raises:
        DataError: it cannot be read, or `datasets` is not installed.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._rows, files = _load(path)
        except ImportError:
            raise DataError.at(
                path,
                got="a data set of Hugging Face, and no package `datasets`",
                expected="that package, which reads it",
                do="pip install 'ds_lvx[data]'",
            ) from None
        except DataError:
            raise
        except Exception as error:  # pyarrow and datasets raise whatever files lead them to
            raise DataError.at(
                path,
                got=f"a data set that cannot be read ({str(error) or type(error).__name__})",
                expected="files of `datasets`, parquet or arrow, whole",
                do="copy or download it again",
            ) from error
        digest = hashlib.sha256()
        for file in map(Path, files):
            with file.open("rb") as opened:
                size = file.stat().st_size
                opened.seek(max(size - _TAIL_BYTES, 0))
                digest.update(repr((file.name, size)).encode() + opened.read())
        self.sha256 = digest.hexdigest()
        if not len(self):
            raise DataError.at(path, got="no rows", expected="at least one", do="add samples to it")

    @property
    def folder(self) -> str:
        """The data set's, or that of its file."""
        return self.path if Path(self.path).is_dir() else str(Path(self.path).parent)

    def __len__(self) -> int:
        return len(self._rows)

    def source(self, index: int) -> Source:
        """A row."""
        return Source(self.path, index + 1, f"row {index}")

    def raw(self, index: int) -> bytes:
        """A row with the checksums of its media."""
        return repr(self.record(index)).encode("utf-8", "surrogateescape")

    def record(self, index: int) -> dict[str, Any]:
        """A row; columns without a value are left out."""
        blobs: list[bytes] = []

        def held(name: str, data: bytes) -> Held:
            blobs.append(data)
            return Held.of(name, data, partial(self._blob, index, len(blobs) - 1))

        row: dict[str, Any] = _with_media(self._row(index), held)
        return {key: value for key, value in row.items() if value is not None}

    def blocks(self, kept: Sequence[int]) -> tuple[int, ...]:
        """All together."""
        return (len(kept),)

    def _row(self, index: int) -> Any:
        return self._rows[index : index + 1].to_pylist()[0]

    def _blob(self, index: int, number: int) -> bytes:
        return next(islice(_blobs(self._row(index)), number, None))


def _load(path: str) -> tuple[Any, list[str]]:
    """A data set whose rows are Arrow's, and its files."""
    import datasets

    folder = Path(path)
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(each.name for each in folder.iterdir() if each.is_dir())
        raise DataError.at(
            path,
            got=f"several splits: {', '.join(splits)}",
            expected="one of them",
            do=f"name its folder: {folder / splits[0] if splits else path}",
        )
    if (folder / "state.json").is_file():
        rows = datasets.load_from_disk(path)
        return rows.with_format("arrow"), [each["filename"] for each in rows.cache_files]
    files = [path] if folder.is_file() else sorted(map(str, folder.glob("*")))
    kinds = {kind: [file for file in files if file.endswith(kind)] for kind in TABLES}
    if all(kinds.values()):
        raise DataError.at(
            path, got="parquet and arrow files", expected="one kind", do="name one of the files"
        )
    parts = [datasets.Dataset.from_file(file) for file in kinds[".arrow"]]
    if kinds[".parquet"]:
        # Arrow's, mapped into memory, in the cache folder of `datasets`.
        silent = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            parts = [datasets.Dataset.from_parquet(kinds[".parquet"])]
        finally:
            if not silent:
                datasets.enable_progress_bars()
    rows = datasets.concatenate_datasets(parts)
    return rows.with_format("arrow"), kinds[".parquet"] or kinds[".arrow"]


def _stored(value: Any) -> tuple[str | None, bytes | None] | None:
    """Path and bytes of what `datasets` stores of an image or a video, or of plain bytes; None: it
    is neither."""
    if isinstance(value, bytes):
        return None, value
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        return value["path"], value["bytes"]
    return None


def _with_media(value: Any, held: Callable[[str, bytes], Held]) -> Any:
    stored = _stored(value)
    if stored is not None:
        name, data = stored
        return name if data is None else held(name or f"{len(data):,} bytes", data)
    if isinstance(value, dict):
        return {key: _with_media(each, held) for key, each in value.items()}
    return [_with_media(each, held) for each in value] if isinstance(value, list) else value


def _blobs(value: Any) -> Iterator[bytes]:
    """The bytes of media, in the order of `_with_media`."""
    stored = _stored(value)
    if stored is not None:
        if stored[1] is not None:
            yield stored[1]
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _blobs(each)
