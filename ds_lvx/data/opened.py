"""From a path to the records behind it, by what lies there.

| path | records |
|---|---|
| a file that begins with `{` or `[` | the lines of a JSONL file, the elements of a JSON array |
| a folder of ``datasets.save_to_disk``, ``*.parquet``, ``*.arrow``, a folder of these | rows |
| ``*.tar``, a folder of these, ``NAME{000..009}.tar`` | samples of webdataset shards |
| ``dataset_info.json:NAME``, a folder with that file | as LLaMA-Factory reads them |
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ds_lvx.data.errors import DataError
from ds_lvx.data.formats import Convert
from ds_lvx.data.formats.dataset_info import INFO, entry
from ds_lvx.data.limits import DEFAULT_LIMITS, Limits
from ds_lvx.data.lines import Lines
from ds_lvx.data.records import Records
from ds_lvx.data.shards import Shards
from ds_lvx.data.table import SAVED, TABLES, Table

_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def open_data(
    path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS
) -> tuple[Records, Convert | None]:
    """The records of a data set, and how to convert them where the data set says it itself.

    Raises:
        DataError: of the data set as a whole: nothing there, or nothing that is read.
    """
    given = os.fspath(path)
    _refuse(given)
    if (named := re.fullmatch(rf"(.*{re.escape(INFO)})(?::(.*))?", given)) is not None:
        file, convert = entry(named[1], named[2])
        return open_data(file, limits=limits)[0], convert
    if given.endswith(".tar"):
        return Shards(given, _braced(given)), None
    if given.endswith(TABLES):
        return Table(given), None
    folder = Path(given)
    if not folder.is_dir():
        return Lines(given, limits=limits), None
    if any((folder / name).exists() for name in SAVED) or _inside(folder, TABLES):
        return Table(given), None
    if tars := _inside(folder, (".tar",)):
        return Shards(given, tars), None
    if (folder / INFO).is_file():
        return open_data(folder / INFO, limits=limits)
    return Lines(given, limits=limits), None  # which says that it is a folder


def _inside(folder: Path, endings: tuple[str, ...]) -> list[str]:
    return sorted(str(path) for path in folder.iterdir() if path.name.endswith(endings))


def _braced(path: str) -> list[str]:
    """The files that ``NAME{000..009}.tar`` names."""
    braces = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", path)
    if braces is None:
        return [path]
    before, first, last, after = braces.groups()
    width = len(first) if first.startswith("0") else 1
    return [f"{before}{n:0{width}}{after}" for n in range(int(first), int(last) + 1)]


def _refuse(path: str) -> None:
    """Say what to do with what is not read."""
    address = re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|pipe:", path)
    packed = path.endswith(_PACKED)
    if address is not None or packed:
        raise DataError.at(
            path,
            got=f"the address {address[0]}..." if address else "an archive that is packed",
            expected="a file or a folder of this machine" if address else "a .tar",
            do="download it first" if address else "unpack it to .tar",
        )
