"""Where tensors lie in a message. Without torch: the planner counts bytes by it, too."""

from __future__ import annotations

from collections.abc import Iterable

ALIGNMENT_BYTES = 16  # what NCCL and kernels copy at once; elsewhere they fall to single bytes


def padded(nbytes: Iterable[int]) -> list[int]:
    """Bytes of tensors inside a message, in which each begins at a multiple of 16.

    One alone has nobody behind it, and is not padded.

    Args:
        nbytes: of each tensor; in a message of rows, of a row of it.
    """
    sizes = list(nbytes)
    if len(sizes) < 2:
        return sizes
    return [-(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for size in sizes]
