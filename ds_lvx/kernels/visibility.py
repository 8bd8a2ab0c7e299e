"""Who may see what: one integer rule instead of dense masks.

    query i sees key j   <=>   q_start[i] <= kv_pos[j] < q_end[i]
                               and not gap_start[i] <= kv_pos[j] < gap_end[i]

Most rules have no gap. Texts that begin alike have one: each sees what all of them begin with, and
what is its own, but none of the others' tokens between.

Memory is O(S_q + S_kv), where a mask is O(S_q x S_kv). Legend: B batch, S_q queries, S_kv keys.
Worked example, two images of two tokens each, a text of three tokens that sees nothing, image 0,
and both: ``kv_pos = [0, 0, 1, 1]``, ``q_start = [0, 0, 0]``, ``q_end = [0, 1, 2]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_lvx.kernels.transfer import to_device

_QUERIES, _KEYS = ("q_start", "q_end", "gap_start", "gap_end"), ("kv_pos",)
EVERYTHING = torch.iinfo(torch.int32).max
"""A ``q_end`` beyond every key; a key at this very position is seen by nobody."""


@dataclass(frozen=True)
class Visibility:
    """Which keys each query may attend to. Blocks of keys that nobody sees are skipped.

    Args:
        q_start: int32 ``[batch, seqlen_q]``, first key position that a query of this rank sees.
        q_end: int32 ``[batch, seqlen_q]``, the position after the last one. ``q_end <= q_start`` is
            an empty row: out = 0, lse = -inf, gradients 0.
        kv_pos: int32 ``[batch, seqlen_kv]``, the position of each key of this rank; any order.
        gap_start, gap_end: int32 ``[batch, seqlen_q]``, both or none: the first position that the
            query does not see although it lies between, and the one after the last; as for an empty
            row, none where ``gap_end <= gap_start``.

    Raises:
        ValueError: another dtype or number of dimensions, batches or lengths that differ, one end
            of the gaps alone, or tensors on different devices.
    """

    q_start: Tensor
    q_end: Tensor
    kv_pos: Tensor
    gap_start: Tensor | None = None
    gap_end: Tensor | None = None

    def __post_init__(self) -> None:
        for name in _QUERIES[:2] + _KEYS + (_QUERIES[2:] if self.has_gaps else ()):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dtype != torch.int32 or value.dim() != 2:
                got = (
                    f"{value.dtype} {list(value.shape)}"
                    if isinstance(value, Tensor)
                    else type(value).__name__
                )
                raise ValueError(
                    f"Visibility.{name}: got {got}; expected an int32 tensor [batch, seqlen]; "
                    "convert it with .to(torch.int32)"
                )
        others = (self.q_end, self.gap_start, self.gap_end) if self.has_gaps else (self.q_end,)
        alike = all(t is not None and t.shape == self.q_start.shape for t in others)
        if not alike or len(self.q_start) != len(self.kv_pos):
            found = ", ".join(f"{name} {list(t.shape)}" for name, t in self._named())
            raise ValueError(
                f"Visibility: got {found}; expected [batch, seqlen_q] for all that queries have, "
                "and [batch, seqlen_kv] with the same batch"
            )
        devices = {t.device: None for _, t in self._named()}
        if len(devices) > 1:
            raise ValueError(
                f"Visibility: got tensors on {' and '.join(map(str, devices))}; expected one device"
            )

    @property
    def has_gaps(self) -> bool:
        """Whether it has gaps, be they empty."""
        return self.gap_start is not None or self.gap_end is not None

    @property
    def queries(self) -> tuple[Tensor, ...]:
        """What each query sees: ``q_start``, ``q_end``, and the gaps if there are any."""
        return tuple(t for name, t in self._named() if name in _QUERIES)

    def _named(self) -> list[tuple[str, Tensor]]:
        pairs = ((name, getattr(self, name)) for name in _QUERIES + _KEYS)
        return [(name, value) for name, value in pairs if value is not None]

    @classmethod
    def of(cls, queries: Iterable[Tensor], kv_pos: Tensor) -> Visibility:
        """From what `queries` returns and the positions of keys."""
        start, end, *gaps = queries
        return cls(start, end, kv_pos, *gaps)

    def each(self, change: Callable[[Tensor], Tensor]) -> Visibility:
        """The same with every tensor changed."""
        return Visibility.of(map(change, self.queries), change(self.kv_pos))

    @classmethod
    def all(cls, batch: int, seqlen_q: int, seqlen_kv: int, *, device: torch.device) -> Visibility:
        """Everything is visible."""

        def full(length: int, value: int) -> Tensor:
            return torch.full((batch, length), value, dtype=torch.int32, device=device)

        return cls(full(seqlen_q, 0), full(seqlen_q, 1), full(seqlen_kv, 0))

    def gaps_meet(self, low: Tensor, high: Tensor) -> Tensor:
        """bool: of which queries a gap has some position from ``low`` to ``high``, ``[B, S_q]`` or
        broadcast to it; of a rule without gaps a False that is."""
        if self.gap_start is None or self.gap_end is None:
            return torch.zeros((), dtype=torch.bool, device=low.device)
        first, stop = self.gap_start, self.gap_end
        return (first < stop) & (first <= high) & (low < stop)

    def without_gaps(self) -> Visibility:
        """The same but for the gaps."""
        return Visibility(self.q_start, self.q_end, self.kv_pos)

    def part(self, queries: slice | Tensor, keys: slice | Tensor) -> Visibility:
        """Some of the queries over some of the keys, by their places; of slices views."""
        return Visibility.of((t[:, queries] for t in self.queries), self.kv_pos[:, keys])

    def clone(self) -> Visibility:
        """The same in memory of its own, which nobody else writes to before backward."""
        return self.each(Tensor.clone)

    def contiguous(self) -> Visibility:
        """The same with tensors that a kernel can read row after row."""
        return self.each(Tensor.contiguous)

    def to(self, device: torch.device) -> Visibility:
        """The same on a device; nobody waits for the copy."""
        return self.each(lambda tensor: to_device(tensor, device))

    def mask(self, queries: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """The rule as bool ``[batch, queries, keys]``, for a block that may be dense."""
        position = self.kv_pos[:, None, keys]
        start, end, *gaps = (each[:, queries, None] for each in self.queries)
        seen = (start <= position) & (position < end)
        if gaps:
            seen &= (position < gaps[0]) | (gaps[1] <= position)
        return seen
