"""Which sample comes when: one endless, seeded sequence that knows its place.

A place is the number of samples seen so far, by all replicas together. It is all that a resumed run
needs, whatever the batch sizes are now::

    place            0 1 2 3 | 4 5 6 7 | 8 ...        2 replicas, 2 samples a micro-batch
    replica          0 0 1 1 | 0 0 1 1 | 0
    epoch (5 samples)  0 0 0 0   0 1 1 1   1          an epoch may end inside a batch
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch


class SampleOrder:
    """A new permutation of the samples for every epoch.

    Args:
        num_samples: in the data set.
        seed: of the permutations.
        shuffle: False keeps the order of the file.
        blocks: samples of each file of the data set: files are permuted, and samples inside each,
            so that a file is read while its samples are taken. None: all in one.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        *,
        shuffle: bool = True,
        blocks: tuple[int, ...] | None = None,
    ) -> None:
        self.num_samples = num_samples
        self._seed = seed
        self._shuffle = shuffle
        self._blocks = (num_samples,) if blocks is None else blocks

    def sample(self, place: int) -> int:
        """The index of the sample at a place."""
        epoch, offset = divmod(place, self.num_samples)
        if not self._shuffle:
            return offset
        return _permutation(self._blocks, self._seed, epoch)[offset]

    def micro_batch(self, place: int, size: int, *, replica: int = 0) -> list[int]:
        """The samples of one replica for the micro-batch that begins at a place.

        Args:
            place: samples seen before it, by all replicas.
            size: samples of a micro-batch, one replica's.
            replica: data-parallel rank.
        """
        start = place + replica * size
        return [self.sample(p) for p in range(start, start + size)]


@lru_cache(maxsize=4)
def _permutation(blocks: tuple[int, ...], seed: int, epoch: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    if len(blocks) == 1:
        return tuple(torch.randperm(blocks[0], generator=generator).tolist())
    begins = [0, *accumulate(blocks)]
    order: list[int] = []
    for block in torch.randperm(len(blocks), generator=generator).tolist():
        inside = torch.randperm(blocks[block], generator=generator)
        order += (inside + begins[block]).tolist()
    return tuple(order)
