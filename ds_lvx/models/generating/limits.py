"""How long a text has to be to be shared by the ranks of a generation. Imports no torch."""

from __future__ import annotations

SPLIT_TOKENS = 2048
"""A text of so many tokens is split over the ranks, where its family can: a prompt, or what comes
behind a cache."""
SHARDED_BYTES = 4 << 30
"""With ``auto`` keys stay where all of them, of every layer and row, would take more than this on a
rank. That is a twentieth of a GPU with 80 GiB. It reads 4 GiB in about 1.3 ms, which is what 32
layers' messages of 40 us take: so the memory is saved for next to no time."""


def splits(tokens: int, ranks: int) -> bool:
    """Whether a text of so many tokens is split over ranks by its length alone."""
    return ranks > 1 and tokens >= SPLIT_TOKENS
