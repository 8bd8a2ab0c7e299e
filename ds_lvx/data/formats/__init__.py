"""The formats of records: each is told by its content, and converted into our own.

Our own is that of `ds_lvx.data.chat`, with a `ds_lvx.data.conversation.Medium` where a format says
more of a medium than its path. What a record says wrong beyond its format is found there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_lvx.data.conversation import Own
from ds_lvx.data.errors import DataError, Source
from ds_lvx.data.formats import llava, messages, openai, prompt, sharegpt
from ds_lvx.data.records import Records

Record = dict[str, Any]
Convert = Callable[[Record, Source], Record]
_LOOKED_AT = 64
"""Records that the format is told by."""
_DEFAULT = "messages"


@dataclass(frozen=True)
class Format:
    """One way to write a sample.

    Attributes:
        sniff: 2: a record is in this format; 1: it is, as far as can be seen; 0: it is not.
        convert: a record into our own form.
        includes: formats whose records of sniff 1 are in this one too.
    """

    sniff: Callable[[Mapping[str, Any]], int]
    convert: Convert
    includes: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    "messages": Format(messages.sniff, messages.convert),
    "openai": Format(openai.sniff, openai.convert, ("messages",)),
    "llava": Format(llava.sniff, llava.convert, ("sharegpt",)),
    "sharegpt": Format(sharegpt.sniff, sharegpt.convert),
    "prompt": Format(prompt.sniff, prompt.convert),
}


def convert_of(records: Records, wanted: str | None, own: Convert | None) -> tuple[str, Convert]:
    """How to convert the records of a file.

    Args:
        records: of the file.
        wanted: a format; None tells it by the content of some records.
        own: what the file itself says of its columns, if it does.

    Returns:
        Its name, and what converts a record.

    Raises:
        DataError: the content may be of several formats, or the file says its columns itself.
    """
    if own is not None:
        if wanted is not None:
            raise DataError.at(
                "--format",
                got=f"{wanted} for {records.path}, whose columns dataset_info.json names",
                expected="none",
                do="leave it out, or name the file itself",
            )
        return "dataset_info", own
    name = told(records) if wanted is None else wanted
    if name not in FORMATS:
        known = ", ".join(FORMATS)
        raise DataError.at("--format", got=repr(name), expected=f"one of {known}", do="correct it")
    return name, FORMATS[name].convert


def told(records: Records) -> str:
    """The format of a file, by the content of records from its beginning to its end.

    Raises:
        DataError: it may be one or another.
    """
    best: dict[str, tuple[int, Source]] = {}
    for index in _some(len(records)):
        try:
            record = records.record(index)
        except DataError:  # said when its turn comes
            continue
        if isinstance(record, Own):
            continue
        for name, each in FORMATS.items():
            score = each.sniff(record)
            if score > best.get(name, (0,))[0]:
                best[name] = score, records.source(index)
    included = {
        other
        for name, (score, _) in best.items()
        for other in FORMATS[name].includes
        if score == 2 and best.get(other, (2,))[0] == 1
    }
    left = {name: source for name, (_, source) in best.items() if name not in included}
    if len(left) > 1:
        found = " and ".join(f"{name} ({source})" for name, source in left.items())
        raise DataError.at(
            records.path,
            got=f"content that may be of the formats {found}",
            expected="one of them in all the file",
            do=f"say which: --format {next(iter(left))}",
        )
    return next(iter(left), _DEFAULT)


def _some(count: int) -> Sequence[int]:
    if count <= _LOOKED_AT:
        return range(count)
    return sorted({n * (count - 1) // (_LOOKED_AT - 1) for n in range(_LOOKED_AT)})
