"""How counts are cut among ranks: a run of neighbours for each. This module imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def split(count: int, parts: int) -> tuple[int, ...]:
    """Lengths of a balanced contiguous split: the first ``count % parts`` parts hold one more."""
    each, more = divmod(count, parts)
    return tuple(each + (part < more) for part in range(parts))


def before(counts: Tensor) -> Tensor:
    """Sums of all that come before each."""
    return counts.cumsum(0) - counts


def parts_of(starts: Tensor, lengths: Tensor, total: Tensor, parts: int) -> Tensor:
    """int64: which of ``parts`` equal parts of a line the middle of each piece lies in.

    Args:
        starts, lengths: of the pieces, whole numbers or not.
        total: length of the line.
        parts: how many.
    """
    part = (2 * starts + lengths) * parts // (2 * total)
    return part.long().clamp(max=parts - 1)  # of no length at the end: in the last


def span(lengths: Sequence[int], rank: int) -> slice:
    """Where the part of ``rank`` lies in the whole."""
    start = sum(lengths[:rank])
    return slice(start, start + lengths[rank])
