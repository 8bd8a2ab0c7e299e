"""What ranks say to each other before a collective: JSON records, and errors that all ranks raise.

A rank that found a mistake sends it in place of its record, so that no other rank is left waiting.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

RECORD_BYTES = 2048
"""Of a message that fits at once."""
_LENGTH_BYTES = 8
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ValueError, NotImplementedError, RuntimeError)
}


def _kind(error: Exception) -> type[Exception]:
    # NotImplementedError is a RuntimeError: the most special kind is asked for first.
    for kind in (NotImplementedError, ValueError, RuntimeError):
        if isinstance(error, kind):
            return kind
    return ValueError


def encode(record: dict[str, Any], error: Exception | None) -> bytes:
    """A rank's message: its record, or what it found wrong, a record that is no JSON included."""
    if error is None:
        try:
            return json.dumps({"record": record}).encode()
        except (TypeError, ValueError) as raised:
            error = raised
    message = {"record": {}, "error": str(error), "kind": _kind(error).__name__}
    return json.dumps(message).encode()


def decode(messages: Sequence[bytes], error: Exception | None) -> list[dict[str, Any]]:
    """The records of all ranks; ranks that said the same have one object in common.

    Args:
        messages: by rank.
        error: this rank's own, as the cause.

    Raises:
        ValueError, NotImplementedError, RuntimeError: a rank sent an error; the message names it.
    """
    said = {message: json.loads(message) for message in dict.fromkeys(messages)}
    answers = [said[message] for message in messages]
    failed = {rank: answer for rank, answer in enumerate(answers) if "error" in answer}
    if failed:
        kind = _KINDS[next(iter(failed.values()))["kind"]]
        raise kind(_describe(failed, len(answers))) from error
    return [answer["record"] for answer in answers]


def framed(message: bytes, capacity: int) -> bytearray:
    """A message's length, and as much of it as there is room for in so many bytes."""
    head = len(message).to_bytes(_LENGTH_BYTES, "little")
    return bytearray((head + message)[:capacity].ljust(capacity, b"\0"))


def unframed(frames: Sequence[bytes]) -> tuple[list[bytes], int]:
    """The messages of `framed`, and the capacity that the longest of them needs."""
    lengths = [int.from_bytes(frame[:_LENGTH_BYTES], "little") for frame in frames]
    pairs = zip(frames, lengths, strict=True)
    messages = [frame[_LENGTH_BYTES : _LENGTH_BYTES + length] for frame, length in pairs]
    return messages, max(lengths) + _LENGTH_BYTES


def require_same(records: Sequence[Mapping[str, Any]], keys: Collection[str], *, what: str) -> None:
    """Raise a ValueError, the same on every rank, unless all records agree in ``keys``."""
    if all(record is records[0] for record in records):  # as `decode` has them
        return
    for key in keys:
        ranks_by_value: dict[str, list[int]] = {}
        for rank, record in enumerate(records):
            ranks_by_value.setdefault(str(record.get(key, "nothing")), []).append(rank)
        if len(ranks_by_value) > 1:
            found = ", ".join(
                f"{value} on {_name(ranks, len(records))}"
                for value, ranks in ranks_by_value.items()
            )
            raise ValueError(
                f"{what}: the ranks disagree on {key}: got {found}; expected the same on every "
                "rank of the group"
            )


def _describe(failed: dict[int, dict[str, Any]], size: int) -> str:
    ranks_by_text: dict[str, list[int]] = {}
    for rank, answer in failed.items():
        ranks_by_text.setdefault(answer["error"], []).append(rank)
    return "; ".join(f"{_name(ranks, size)}: {text}" for text, ranks in ranks_by_text.items())


def _name(ranks: Sequence[int], size: int) -> str:
    if len(ranks) == size:
        return "all ranks"
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
