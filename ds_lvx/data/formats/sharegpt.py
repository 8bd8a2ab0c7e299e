"""ShareGPT's: ``conversations`` as LLaVA's, beside them ``images``, ``videos`` and ``system``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_lvx.data.errors import Source
from ds_lvx.data.formats import media, turns


def sniff(record: Mapping[str, Any]) -> int:
    """Whether a record has turns, and lists of media, or none, beside them."""
    if not isinstance(record.get("conversations"), list):
        return 0
    if any(record.get(f"{kind}s") for kind in media.KINDS):
        return 2
    return int(bool(record["conversations"]) and not any(record.get(k) for k in media.KINDS))


def convert(record: dict[str, Any], source: Source) -> dict[str, Any]:
    """A record in our own form; ``tools`` and the like stay beside the messages, to be refused.

    Raises:
        DataError: it is not in this format.
    """
    words = media.words(record, plural=True)
    said = turns.messages(record, source, key="conversations", tags=turns.Tags(), words=words)
    taken = ("conversations", "system", *media.columns(record))
    rest = {key: value for key, value in record.items() if key not in taken}
    return {**rest, "messages": turns.with_system(record, said), **media.listed(record, source)}
