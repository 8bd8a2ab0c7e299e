"""Counting what this rank sends: `traffic`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Counter:
    """Bytes that this rank sent to other ranks, and the number of calls."""

    bytes_sent: int = 0
    calls: int = 0


@dataclass
class Traffic:
    """What this rank sent while the `traffic` context was open, by collective.

    Attributes:
        per_collective: the `Counter` of ``"all_gather"``, ``"all_to_all"``, ``"send_recv"`` and
            ``"all_reduce"``. Bytes are those of the tensors (no packet headers); a rank's message
            to itself does not count; an all-reduce counts as ``2 (n - 1) / n`` of its tensor.
        control: the same for the control plane, which is not part of the totals.
    """

    per_collective: dict[str, Counter] = field(default_factory=dict)
    control: Counter = field(default_factory=Counter)

    @property
    def bytes_sent(self) -> int:
        """Bytes this rank sent on the data plane."""
        return sum(counter.bytes_sent for counter in self.per_collective.values())

    @property
    def calls(self) -> int:
        """Collectives this rank took part in on the data plane."""
        return sum(counter.calls for counter in self.per_collective.values())


_open_counters: list[Traffic] = []  # not thread-local: backward may run on autograd's own threads


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count the bytes that ds_lvx's operators send from this rank, forward and backward.

    Contexts nest; DeepSpeed's own traffic (ZeRO, gradients) is not counted.

    Returns:
        A context manager whose value is a `Traffic`: ``.bytes_sent``, ``.calls`` and both
        ``.per_collective``.
    """
    counter = Traffic()
    _open_counters.append(counter)
    try:
        yield counter
    finally:
        # By identity: two open counters may hold equal figures.
        _open_counters[:] = [other for other in _open_counters if other is not counter]


def count(collective: str, bytes_sent: int) -> None:
    """Add one call of ``collective`` that sent ``bytes_sent`` bytes to every open `traffic`."""
    for counter in _open_counters:
        entry = counter.per_collective.setdefault(collective, Counter())
        entry.bytes_sent += bytes_sent
        entry.calls += 1


def count_control(bytes_sent: int) -> None:
    for counter in _open_counters:
        counter.control.bytes_sent += bytes_sent
        counter.control.calls += 1
