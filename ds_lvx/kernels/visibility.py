"""Who may see what: one integer rule instead of dense masks.

    query i sees key j   <=>   q_start[i] <= kv_pos[j] < q_end[i]

Memory is O(S_q + S_kv), where a mask is O(S_q x S_kv). Legend: B batch, S_q queries, S_kv keys.
Worked example, two images of two tokens each, a text of three tokens that sees nothing, image 0,
and both: ``kv_pos = [0, 0, 1, 1]``, ``q_start = [0, 0, 0]``, ``q_end = [0, 1, 2]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

EVERYTHING = torch.iinfo(torch.int32).max
"""A ``q_end`` beyond every key; a key at this very position is seen by nobody."""


@dataclass(frozen=True)
class Visibility:
    """Which keys each query may attend to. On a CPU, blocks of keys that nobody sees are skipped.

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

    @property
    def ranges(self) -> Tensor:
        """``q_start`` and ``q_end`` as one int32 ``[2, batch, seqlen_q]``: what travels."""
        return torch.stack((self.q_start, self.q_end))

    def with_queries(self, ranges: Tensor) -> Visibility:
        """The same keys under other queries; ``ranges`` is int32 ``[2, batch, seqlen_q]``."""
        return Visibility(ranges[0], ranges[1], self.kv_pos)

    def with_keys(self, kv_pos: Tensor) -> Visibility:
        """The same queries over other keys; ``kv_pos`` is int32 ``[batch, seqlen_kv]``."""
        return Visibility(self.q_start, self.q_end, kv_pos)

    def mask(self, queries: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """The rule as bool ``[batch, queries, keys]``, for a block that may be dense."""
        position = self.kv_pos[:, None, keys]
        start = self.q_start[:, queries, None]
        return (start <= position) & (position < self.q_end[:, queries, None])


@dataclass(frozen=True)
class Block:
    """A rectangle of queries and keys that a kernel computes at once.

    ``mask`` is bool ``[batch, queries, keys]``, or None where every query sees every key.
    """

    queries: slice
    keys: slice
    mask: Tensor | None


def blocks(
    visibility: Visibility | None,
    *,
    seqlen_q: int,
    seqlen_kv: int,
    queries_per_block: int,
    keys_per_block: int,
) -> Iterator[Block]:
    """Cut queries and keys into blocks; leave out what no query sees; mask only where needed.

    On a CPU, blocks that nobody sees are skipped and each block's queries are narrowed to the run
    that sees any of it. On an accelerator this would make its stream wait for the host, so every
    block comes whole and with its mask. A mask lives as long as its block is held.
    """
    for first_key in range(0, seqlen_kv, keys_per_block):
        keys = slice(first_key, min(first_key + keys_per_block, seqlen_kv))
        for first_query in range(0, seqlen_q, queries_per_block):
            queries = slice(first_query, min(first_query + queries_per_block, seqlen_q))
            if visibility is None:
                yield Block(queries, keys, None)
            elif visibility.kv_pos.device.type != "cpu":
                yield Block(queries, keys, visibility.mask(queries, keys))
            else:
                yield from _narrowed(visibility, queries, keys)


def _narrowed(visibility: Visibility, queries: slice, keys: slice) -> Iterator[Block]:
    position = visibility.kv_pos[:, keys]
    first = position.amin(dim=1, keepdim=True)
    last = position.amax(dim=1, keepdim=True)
    start, end = visibility.q_start[:, queries], visibility.q_end[:, queries]
    sees_some = ((start <= last) & (first < end) & (start < end)).any(dim=0).nonzero()
    if sees_some.numel() == 0:
        return
    low, high = int(sees_some[0]), int(sees_some[-1]) + 1
    sees_all = ((start <= first) & (last < end))[:, low:high].all()
    run = slice(queries.start + low, queries.start + high)
    yield Block(run, keys, None if sees_all else visibility.mask(run, keys))
