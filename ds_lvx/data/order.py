"""Which sample comes when: one endless, seeded sequence that knows its place.

A place is the number of samples seen so far, by all replicas together. It is all that a resumed run
needs, whatever the batch sizes are now::

    place            0 1 2 3 | 4 5 6 7 | 8 ...        2 replicas, 2 samples a micro-batch
    replica          0 0 1 1 | 0 0 1 1 | 0
    epoch (5 samples)  0 0 0 0   0 1 1 1   1          an epoch may end inside a batch
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain

import torch

_WINDOW = 50
"""Batches whose samples are sorted by length; between such windows the order stays random."""


class SampleOrder:
    """A new permutation of the samples for every epoch.

    Args:
        num_samples: in the data set.
        seed: of the permutations.
        shuffle: False keeps the order of the file.
        blocks: samples of each file of the data set: files are permuted, and samples inside each,
            so that a file is read while its samples are taken. None: all in one.
        lengths: of the samples: those of about one length are taken together. None: whatever comes.
        together: samples of a step, of all replicas; with ``lengths``. The shortest come first, so
            that those of one forward are closest.
        media: of each sample a number, the same for those with the same media, which then are taken
            one after the other, at a place that is as random as that of one. None: they are not.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        *,
        shuffle: bool = True,
        blocks: tuple[int, ...] | None = None,
        lengths: Sequence[int] | None = None,
        together: int = 1,
        media: Sequence[int] | None = None,
    ) -> None:
        self.num_samples = num_samples
        self._seed = seed
        self._shuffle = shuffle
        self._blocks = (num_samples,) if blocks is None else blocks
        self._lengths = lengths
        self._together = together
        self._media = media
        self._grouped: dict[int, tuple[int, ...]] = {}

    def sample(self, place: int) -> int:
        """The index of the sample at a place."""
        epoch, offset = divmod(place, self.num_samples)
        if not self._shuffle:
            return offset
        order = _permutation(self._blocks, self._seed, epoch)
        if self._lengths is None and self._media is None:
            return order[offset]
        if epoch not in self._grouped:
            latest = [*self._grouped.items()][-1:]
            self._grouped = {**dict(latest), epoch: self._in_groups(order, epoch)}
        return self._grouped[epoch][offset]

    def _in_groups(self, order: Sequence[int], epoch: int) -> tuple[int, ...]:
        if self._media is not None:
            by_media: dict[int, list[int]] = {}
            for sample in order:
                by_media.setdefault(self._media[sample], []).append(sample)
            # Where one of them comes; where any does, the largest would mostly come first.
            first = {min(samples): samples for samples in by_media.values()}
            return tuple(chain.from_iterable(first.get(sample, ()) for sample in order))
        assert self._lengths is not None
        # An epoch may end inside a batch.
        begun = -epoch * self.num_samples % self._together
        groups = _groups(order, self._lengths, self._together, seed=self._seed + epoch)
        cut = len(groups) - begun
        return groups[cut:] + groups[:cut]

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
        return tuple(torch.randperm(blocks[0], generator=generator, device="cpu").tolist())
    begins = [0, *accumulate(blocks)]
    order: list[int] = []
    for block in torch.randperm(len(blocks), generator=generator, device="cpu").tolist():
        inside = torch.randperm(blocks[block], generator=generator, device="cpu")
        order += (inside + begins[block]).tolist()
    return tuple(order)


def _groups(
    order: Sequence[int], lengths: Sequence[int], together: int, *, seed: int
) -> tuple[int, ...]:
    """An order in which every ``together`` samples are of about one length; the rest comes last."""
    groups: list[list[int]] = []
    for first in range(0, len(order), _WINDOW * together):
        window = sorted(order[first : first + _WINDOW * together], key=lambda n: lengths[n])
        groups += [window[n : n + together] for n in range(0, len(window), together)]
    rest = groups.pop() if len(groups[-1]) < together else []
    generator = torch.Generator().manual_seed(seed % 2**63)
    shuffled = torch.randperm(len(groups), generator=generator, device="cpu").tolist()
    return (*(sample for n in shuffled for sample in groups[n]), *rest)
