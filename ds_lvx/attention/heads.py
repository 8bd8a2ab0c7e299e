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

from ds_lvx.attention.order import Places
from ds_lvx.attention.shape import head_layout
from ds_lvx.distributed.bundles import Spec, readable
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


def to_heads(
    channel: Channel, tensors: Sequence[Tensor], places: Sequence[Places | None] = ()
) -> list[Tensor]:
    """``[B, s, H, D]`` of this rank's tokens -> ``[B, S, H / n, D]``, all tokens; one message.

    Args:
        channel: the n ranks.
        tensors: with as many tokens as those of the other ranks.
        places: of each tensor, where its tokens are in order; None, or none: as they arrive.
    """
    parts = [t.unflatten(2, (channel.size, -1)).movedim(2, 0) for t in tensors]
    order = places or [None] * len(parts)
    runs = _runs([Spec.of(part) for part in parts])
    tables = _exchange(channel, [_side_by_side([parts[i] for i in run]) for run in runs]).wait()
    found: list[Tensor] = []
    for table, run in zip(tables, runs, strict=True):
        heads = [parts[i].shape[3] for i in run]
        found += _all_tokens(table, heads, [order[i] for i in run])
    return found


def to_sequence(
    channel: Channel, tensors: Sequence[Tensor], places: Sequence[Places | None] = ()
) -> Pending[list[Tensor]]:
    """``[B, S, h, D]`` of some of this rank's heads -> ``[B, s, n, h, D]``, those of all ranks.

    Args:
        channel: the n ranks.
        tensors: of all tokens.
        places: as `to_heads` had them.
    """
    order = places or [None] * len(tensors)
    specs = [_leaves(t, at, channel.size) for t, at in zip(tensors, order, strict=True)]
    runs = _runs(specs)
    heads = [[specs[i].shape[3] for i in run] for run in runs]
    tables = [
        _by_rank([tensors[i] for i in run], [order[i] for i in run], [specs[i] for i in run])
        for run in runs
    ]
    return _exchange(channel, tables).then(
        lambda arrived: [
            tensor.movedim(0, 2)
            for table, each in zip(arrived, heads, strict=True)
            for tensor in table.split(each, dim=3)
        ]
    )


def rejoined(parts: Sequence[Tensor], *, dim: int) -> Tensor:
    """All heads, of groups of them that travelled by themselves; no copy where it is one group."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def _all_tokens(
    table: Tensor, heads: Sequence[int], places: Sequence[Places | None]
) -> list[Tensor]:
    """The tensors ``[B, S, h, D]`` that lie side by side in a table ``[n, B, s, H, D]``."""
    first = places[0]
    if first is not None and not table.is_cpu and all(each is first for each in places):
        return list(first.take(table).split(list(heads), dim=2))
    return [
        readable(part.movedim(0, 1).flatten(1, 2)) if at is None else at.take(part)
        for part, at in zip(table.split(list(heads), dim=3), places, strict=True)
    ]


def _by_rank(
    tensors: Sequence[Tensor], places: Sequence[Places | None], specs: Sequence[Spec]
) -> Tensor:
    """The table ``[n, B, s, H, D]`` of tensors ``[B, S, h, D]``, side by side by heads."""
    ranks, batch, tokens, _, width = specs[0].shape
    if all(at is None for at in places):
        return _side_by_side([_apart(tensor, ranks) for tensor in tensors])
    heads = [spec.shape[3] for spec in specs]
    table = tensors[0].new_empty(ranks, batch, tokens, sum(heads), width)
    for tensor, at, part in zip(tensors, places, table.split(heads, dim=3), strict=True):
        if at is None:
            part.copy_(_apart(tensor, ranks))
        else:
            at.put(tensor, part)
    return table


def _leaves(tensor: Tensor, at: Places | None, ranks: int) -> Spec:
    """What of ``[B, S, h, D]`` leaves: ``[n, B, s, h, D]``."""
    batch, length, *of_token = tensor.shape
    tokens = length // ranks if at is None else at.longest
    return Spec((ranks, batch, tokens, *of_token), tensor.dtype)


def _apart(tensor: Tensor, ranks: int) -> Tensor:
    return tensor.unflatten(1, (ranks, -1)).movedim(1, 0)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """One table ``[n, B, s, H, D]`` of parts that differ in heads alone."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=3)


def _runs(parts: Sequence[Spec]) -> list[list[int]]:
    """The tensors of each table: all of them where they differ in heads alone, else each its own"""
    alike = len({(part.shape[2], part.shape[4], part.dtype) for part in parts}) == 1
    numbers = list(range(len(parts)))
    return [numbers] if alike else [[number] for number in numbers]


def _exchange(channel: Channel, tables: Sequence[Tensor]) -> Pending[list[Tensor]]:
    """Send each rank its part of some tables ``[n, B, s, H, D]``, and get theirs of ours."""
    arriving = channel.exchange_rows(list(tables), [0] * len(tables), (1,) * channel.size)
    return arriving.then(lambda found: [table.squeeze(1) for table in found])


def _pad(tensor: Tensor, seqlen: int, heads: int) -> Tensor:
    missing = seqlen - tensor.shape[1]
    return F.pad(tensor, (0, 0, 0, heads, 0, missing)) if missing or heads else tensor
