"""Numbers that must be the same on every rank, sent with a message that goes anyway."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Witness:
    """What ranks that compute the same say of it, so that they notice when they do not.

    Attributes:
        numbers: int64 ``[count]``, this rank's, on the device that computes.
        compare: takes those of all ranks, ``[n, count]``, and raises where they differ. All ranks
            get the same, so that all of them raise, and none before it has what the others sent.
    """

    numbers: Tensor
    compare: Callable[[Tensor], None]
