"""Between tokens and heads: the all-to-alls of Ulysses, and the heads that do not divide.

What leaves at the same time is one message a rank: q, k and v of as many tokens lie side by side in
each token's row, so that at B = 1 kernels read them where they arrive.

Legend: B batch, n ranks, s tokens of a rank and S of all (queries, or keys), H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_lvx.attention.shape import head_layout
from ds_lvx.distributed.bundles import readable
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.pending import Pending


def divided(
    q: Tensor, k: Tensor, v: Tensor, *, ranks: int, seqlen_q: int, seqlen_kv: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with heads that divide by the ranks, and as many tokens as the longest shard.

    Heads of K and V are repeated, up to one a rank; then heads and tokens of zeros are added.
    """
    repeats, padding = head_layout(q.shape[2], k.shape[2], ranks)
    padded_q = _pad(q, seqlen_q, padding * (q.shape[2] // (k.shape[2] * repeats)))
    padded_k, padded_v = (
        _pad(t.repeat_interleave(repeats, dim=2) if repeats > 1 else t, seqlen_kv, padding)
        for t in (k, v)
    )
    return padded_q, padded_k, padded_v


def to_heads(channel: Channel, tensors: Sequence[Tensor]) -> list[Tensor]:
    """``[B, s, H, D]`` of this rank's tokens -> ``[B, S, H / n, D]``, all tokens; one message."""
    parts = [t.unflatten(2, (channel.size, -1)).movedim(2, 0) for t in tensors]
    tables = _exchange(channel, parts).wait()
    # Taken apart before ranks are put one after the other: the one copy of each is dense, and at
    # B = 1 there is none but on a CPU.
    by_rank = _apart(tables, _heads(parts), dim=3)
    return [readable(tensor.movedim(0, 1).flatten(1, 2)) for tensor in by_rank]


def to_sequence(channel: Channel, tensors: Sequence[Tensor]) -> Pending[list[Tensor]]:
    """``[B, S, h, D]`` of some of this rank's heads -> ``[B, s, n, h, D]``, those of all ranks."""
    parts = [t.unflatten(1, (channel.size, -1)).movedim(1, 0) for t in tensors]
    heads = _heads(parts)  # what is sent is not kept until it comes home
    return _exchange(channel, parts).then(
        lambda tables: [t.movedim(0, 2) for t in _apart(tables, heads, dim=3)]
    )


def _exchange(channel: Channel, parts: Sequence[Tensor]) -> Pending[list[Tensor]]:
    """Send each rank its part of some tensors ``[n, B, s, h, D]``, and get theirs of ours.

    Tensors that differ in heads alone lie side by side, by heads, in one table; else each has its
    own.
    """
    tables = [run[0] if len(run) == 1 else torch.cat(run, dim=3) for run in _runs(parts)]
    arriving = channel.exchange_rows(tables, [0] * len(tables), (1,) * channel.size)
    return arriving.then(lambda found: [table.squeeze(1) for table in found])


def _runs(parts: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors of each table."""
    alike = len({(part.shape[2], part.shape[4], part.dtype) for part in parts}) == 1
    return [list(parts)] if alike else [[part] for part in parts]


def _heads(parts: Sequence[Tensor]) -> list[list[int]]:
    """Heads of the tensors of each table."""
    return [[part.shape[3] for part in run] for run in _runs(parts)]


def _apart(tables: Sequence[Tensor], heads: Sequence[list[int]], *, dim: int) -> list[Tensor]:
    """The tensors that lie side by side in tables; these have the heads in ``dim``."""
    pairs = zip(tables, heads, strict=True)
    return [tensor for table, each in pairs for tensor in table.split(each, dim=dim)]


def _pad(tensor: Tensor, seqlen: int, heads: int) -> Tensor:
    missing = seqlen - tensor.shape[1]
    return F.pad(tensor, (0, 0, 0, heads, 0, missing)) if missing or heads else tensor
