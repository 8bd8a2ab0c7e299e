"""Layers that carry a state from token to token: all tokens of some heads come to each rank.

Linear attention reads a sequence from its beginning on, and no rank could start before those ahead
of it are through. But its heads know nothing of each other: as under Ulysses an all-to-all turns
the tokens of all heads into all tokens of some, in the order of the sequence, and another brings
what these give home.

Legend: B batch, n ranks, s tokens of a rank and S of all, G groups of heads, W numbers of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_lvx.attention.heads import to_heads, to_sequence
from ds_lvx.attention.layout import Layout
from ds_lvx.attention.order import Places
from ds_lvx.attention.replay import once
from ds_lvx.distributed.channel import Channel

Take: TypeAlias = Callable[[Tensor], Tensor]
"""``[G, ...]`` of all groups -> ``[g, ...]`` of those of this rank."""
Run: TypeAlias = Callable[[Tensor, Take], Tensor]
"""All tokens ``[B, S, g, W]`` of this rank's groups -> ``[B, S, g, V]``."""


def run_by_heads(layout: Layout, x: Tensor, run: Run, *, order: Tensor | None = None) -> Tensor:
    """Run what knows tokens of all ranks and no two groups of heads at once.

    Args:
        layout: of the text over itself.
        x: ``[B, s, G, W]``, this rank's tokens.
        run: gets the tokens in the order of the sequence, what pads shorter rows last. Where G
            does not divide by the ranks, some run the last group again, and nobody reads it.
        order: int64 ``[B, T]`` on the CPU, where the parts of all ranks, one after the other, have
            each token of the text, below 0 what nobody holds; None: they are in order.

    Returns:
        ``[B, s, G, V]``.

    Collectives: with g groups a rank an all-to-all of ``(n-1) s g W e`` bytes, and one of
        ``(n-1) s g V e``, with s of the rank that holds most; in backward as many. A checkpointed
        layer sends in its first pass alone.
    """
    channel, count = layout.channel, x.shape[2]
    if channel.size == 1:
        return run(x, lambda whole: whole)
    each = -(-count // channel.size)
    missing = each * channel.size - count

    def take(whole: Tensor) -> Tensor:
        return _lengthened(whole, missing, dim=0).narrow(0, channel.rank * each, each)

    padded = F.pad(x, (0, 0, 0, 0, 0, max(layout.q_lengths) - x.shape[1]))
    places = layout.settled(
        ("text places", len(x)),
        lambda: Places.of_text(order, layout.q_lengths, batch=len(x), device=x.device),
    )
    apply: Any = _Exchange.apply
    here = apply(channel, places, _lengthened(padded, missing, dim=2), True)
    found: Tensor = apply(channel, places, run(here, take), False)
    return found[:, : x.shape[1], :count]


def _lengthened(x: Tensor, missing: int, *, dim: int) -> Tensor:
    """With the last of a dimension so many times more."""
    if missing == 0:
        return x
    last = x.narrow(dim, x.shape[dim] - 1, 1)
    return torch.cat((x, *[last] * missing), dim=dim)


class _Exchange(torch.autograd.Function):
    """``[B, s, G, W]`` of this rank's tokens -> ``[B, S, G / n, W]`` in order, or that undone; each
    is the other's backward."""

    @staticmethod
    def forward(
        ctx: Any, channel: Channel, places: Places | None, x: Tensor, to_heads: bool
    ) -> Tensor:
        ctx.what = channel, places, to_heads
        name = f"run_by_heads's {'heads' if to_heads else 'tokens'}"
        return once(name, lambda: _exchanged(channel, places, x, to_heads))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        channel, places, to_heads = ctx.what
        return None, None, _exchanged(channel, places, grad, not to_heads), None


def _exchanged(channel: Channel, places: Places | None, x: Tensor, heads: bool) -> Tensor:
    if heads:
        return to_heads(channel, (x,), (places,))[0]
    return to_sequence(channel, (x.contiguous(),), (places,)).wait()[0].flatten(2, 3)
