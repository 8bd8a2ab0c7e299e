"""Who may see what: one integer rule instead of dense masks.

    query i sees key j   <=>   q_start[i] <= kv_pos[j] < q_end[i]

Memory is O(S_q + S_kv), where a mask is O(S_q x S_kv). Legend: B batch, S_q queries, S_kv keys.
Worked example, two images of two tokens each, a text of three tokens that sees nothing, image 0,
and both: ``kv_pos = [0, 0, 1, 1]``, ``q_start = [0, 0, 0]``, ``q_end = [0, 1, 2]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_lvx.kernels.transfer import to_device

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

    Raises:
        ValueError: another dtype or number of dimensions, batches or lengths that differ, or
            tensors on different devices.
    """

    q_start: Tensor
    q_end: Tensor
    kv_pos: Tensor

    def __post_init__(self) -> None:
        for name in ("q_start", "q_end", "kv_pos"):
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
        if self.q_start.shape != self.q_end.shape or len(self.q_start) != len(self.kv_pos):
            raise ValueError(
                f"Visibility: got q_start {list(self.q_start.shape)}, q_end "
                f"{list(self.q_end.shape)}, kv_pos {list(self.kv_pos.shape)}; expected "
                "[batch, seqlen_q] twice and [batch, seqlen_kv] with the same batch"
            )
        if not self.q_start.device == self.q_end.device == self.kv_pos.device:
            raise ValueError(
                f"Visibility: got tensors on {self.q_start.device}, {self.q_end.device} and "
                f"{self.kv_pos.device}; expected one device"
            )

    @classmethod
    def all(cls, batch: int, seqlen_q: int, seqlen_kv: int, *, device: torch.device) -> Visibility:
        """Everything is visible."""

        def full(length: int, value: int) -> Tensor:
            return torch.full((batch, length), value, dtype=torch.int32, device=device)

        return cls(full(seqlen_q, 0), full(seqlen_q, 1), full(seqlen_kv, 0))

    def part(self, queries: slice | Tensor, keys: slice | Tensor) -> Visibility:
        """Some of the queries over some of the keys, by their places; of slices views."""
        return Visibility(self.q_start[:, queries], self.q_end[:, queries], self.kv_pos[:, keys])

    def clone(self) -> Visibility:
        """The same in memory of its own, which nobody else writes to before backward."""
        parts = (self.q_start, self.q_end, self.kv_pos)
        return Visibility(*(part.clone() for part in parts))

    def contiguous(self) -> Visibility:
        """The same with tensors that a kernel can read row after row."""
        parts = (self.q_start, self.q_end, self.kv_pos)
        return Visibility(*(part.contiguous() for part in parts))

    def to(self, device: torch.device) -> Visibility:
        """The same on a device; nobody waits for the copy."""
        parts = (self.q_start, self.q_end, self.kv_pos)
        return Visibility(*(to_device(part, device) for part in parts))

    def mask(self, queries: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """The rule as bool ``[batch, queries, keys]``, for a block that may be dense."""
        position = self.kv_pos[:, None, keys]
        start = self.q_start[:, queries, None]
        return (start <= position) & (position < self.q_end[:, queries, None])
