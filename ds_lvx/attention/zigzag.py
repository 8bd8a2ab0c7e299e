"""Causal text dealt so that every rank has as much to do, whichever method runs.

A token attends to those before it, so that late ones cost more: in equal runs the last of n ranks
would have 2 n - 1 times the work of the first. Of 2 n pieces rank r holds r and 2 n - 1 - r::

    pieces  0 1 2 | 2 1 0

Where queries of one rank meet keys of another, half of the pairs are visible, whichever the two
are: each step of a ring is as long on all ranks, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_lvx.distributed.groups import SequenceParallelGroups, resolve


def zigzag(length: int, *, groups: SequenceParallelGroups | None = None) -> Tensor:
    """Which tokens of a causal text this rank holds, so that `ring_attention` and `lv_xattn` are
    even::

        here = ds_lvx.zigzag(text.shape[1])
        places = here[None].to(torch.int32)
        causal = ds_lvx.Visibility(torch.zeros_like(places), places + 1, places)
        out = ds_lvx.ring_attention(*(x[:, here] for x in (q, k, v)), visibility=causal)
        order = ds_lvx.gather_sequence(here, 0).argsort()
        whole = ds_lvx.gather_sequence(out)[:, order]

    Args:
        length: tokens of the whole text.
        groups: the groups; None is the current ones, or all ranks as one group.

    Returns:
        int64 ``[s]`` on the CPU, increasing: two pieces, an early and a late one. The first
        ``length % sp_size`` ranks hold one token more.

    Raises:
        ValueError: a negative length.
    """
    if length < 0:
        raise ValueError(f"got length={length}; expected the number of tokens, 0 or more")
    channel = resolve(groups)
    return dealt(length, channel.size)[channel.rank]


def dealt(length: int, ranks: int) -> list[Tensor]:
    """`zigzag` of every rank."""
    each, more = divmod(length, ranks)
    shares = [each + (rank < more) for rank in range(ranks)]
    early = [(share + 1) // 2 for share in shares]
    late = [share // 2 for share in shares]
    pieces = torch.arange(length, device="cpu").split([*early, *reversed(late)])
    return [torch.cat((pieces[rank], pieces[-1 - rank])) for rank in range(ranks)]
