"""The gather schedule of lvx: queries come together on every rank, parts of the result go home.

Large messages go by groups of heads: while some heads are computed, the queries of the next ones
arrive and the parts of the last ones go home. A kernel reads the keys of each head once either way,
so that groups one after the other take no longer than all heads at once. Only the first group's
queries and the last group's parts have no kernel to hide under, hence these two are small.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ds_lvx.attention import rows, wire
from ds_lvx.attention.call import Call
from ds_lvx.attention.keys import Keys, Saved
from ds_lvx.bundles import Bundle
from ds_lvx.kernels.merge import accumulation_dtype, merge
from ds_lvx.pending import Pending
from ds_lvx.plan.shape import head_groups
from ds_lvx.visibility import Visibility


class Gather:
    """All-gather the queries, one kernel over all of them, scatter-reduce the parts by lse."""

    def forward(
        self, call: Call, q: Tensor, visibility: Visibility | None, keys: Keys
    ) -> tuple[Tensor, Tensor]:
        """See `ds_lvx.attention.schedules.Schedule.forward`."""
        groups = _groups(call, q, keys)
        arriving = _gather_queries(call, q, visibility, groups[0])
        keys.prepare()
        seen = visibility
        returning: list[Pending[list[Bundle]]] = []
        for index, group in enumerate(groups):
            bundles = arriving.wait()
            if index == 0:
                seen = _of_everyone(visibility, bundles)
            if index + 1 < len(groups):
                arriving = _gather_queries(call, q, None, groups[index + 1])
            everyone = _joined(bundles, 0, dim=1)
            out, lse = keys.attend(call, everyone, seen, heads=group.keys)
            returning.append(_return_parts(call, q, out, lse))
        parts = [
            merge([rows.decode_part(bundle) for bundle in each.wait()], accumulation_dtype(q.dtype))
            for each in returning
        ]
        return _whole([out for out, _ in parts], dim=2), _whole([lse for _, lse in parts], dim=1)

    def backward(
        self, call: Call, saved: Saved, visibility: Visibility | None, keys: Keys
    ) -> Tensor:
        """See `ds_lvx.attention.schedules.Schedule.backward`."""
        groups = _groups(call, saved.q, keys)
        arriving = _gather_gradients(call, saved, visibility, groups[0])
        keys.prepare()
        seen = visibility
        returning: list[Pending[list[Bundle]]] = []
        for index, group in enumerate(groups):
            bundles = arriving.wait()
            if index == 0:
                seen = _of_everyone(visibility, bundles)
            if index + 1 < len(groups):
                arriving = _gather_gradients(call, saved, None, groups[index + 1])
            everyone = Saved(*(_joined(bundles, i, dim=dim) for i, dim in enumerate((1, 1, 2, 2))))
            dq = keys.gradients(call, everyone, seen, heads=group.keys)
            returning.append(_return_gradients(call, saved.q, dq))
            del everyone, bundles, dq  # the projection's backward needs the room
        keys.finish()
        dtype = accumulation_dtype(saved.q.dtype)
        parts = [_sum([wire.decode(bundle) for bundle in each.wait()], dtype) for each in returning]
        return _whole(parts, dim=2)


# --------------------------------------------------------------------------------------------
# Heads


@dataclass(frozen=True)
class _Group:
    """Neighbouring heads that travel and are attended to together.

    Attributes:
        queries: of q.
        keys: of K and V; None for all, however many these are.
    """

    queries: slice
    keys: slice | None


def _groups(call: Call, q: Tensor, keys: Keys) -> list[_Group]:
    """The groups, the same on every rank, in forward and in backward."""
    batch, _, heads, head_dim = q.shape
    if keys.kv_heads is None:
        return [_Group(slice(None), None)]
    sizes = head_groups(
        kv_heads=keys.kv_heads,
        q_bytes=batch * max(call.q_lengths) * heads * head_dim * q.element_size(),
        on_cpu=q.device.type == "cpu",
    )
    if len(sizes) == 1:
        return [_Group(slice(None), None)]
    share = heads // keys.kv_heads
    return [
        _Group(slice(first * share, last * share), slice(first, last))
        for first, last in pairwise(accumulate(sizes, initial=0))
    ]


def _whole(parts: list[Tensor], *, dim: int) -> Tensor:
    """All heads again."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


# --------------------------------------------------------------------------------------------
# Out


def _gather_queries(
    call: Call, q: Tensor, visibility: Visibility | None, group: _Group
) -> Pending[list[Bundle]]:
    q = q[:, :, group.queries]
    specs = [rows.query_specs(call, q, visibility, rank) for rank in range(call.channel.size)]
    return call.channel.gather([q, *rows.ranges(visibility)], specs)


def _gather_gradients(
    call: Call, saved: Saved, visibility: Visibility | None, group: _Group
) -> Pending[list[Bundle]]:
    mine = saved.of_heads(group.queries)
    specs = [rows.gradient_specs(call, mine, visibility, rank) for rank in range(call.channel.size)]
    return call.channel.gather([*mine.bundle(), *rows.ranges(visibility)], specs)


def _joined(bundles: list[Bundle], index: int, *, dim: int) -> Tensor:
    """One tensor of every rank's bundle, rank after rank."""
    return torch.cat([bundle[index] for bundle in bundles], dim=dim)


def _of_everyone(visibility: Visibility | None, bundles: list[Bundle]) -> Visibility | None:
    if visibility is None:
        return None
    return visibility.with_queries(torch.cat([bundle[-1] for bundle in bundles], dim=2))


# --------------------------------------------------------------------------------------------
# Home


def _return_parts(call: Call, q: Tensor, out: Tensor, lse: Tensor) -> Pending[list[Bundle]]:
    """Send each rank the part of its rows; this rank's own stays here as it is."""
    lengths, channel = list(call.q_lengths), call.channel
    pairs = zip(out.split(lengths, dim=1), lse.split(lengths, dim=2), strict=True)
    leaving = [
        [lse, out] if rank == channel.rank else rows.encode_part(out, lse, q.dtype)
        for rank, (out, lse) in enumerate(pairs)
    ]
    own_lse, own_out = leaving[channel.rank]
    return channel.exchange(leaving, [rows.part_specs(own_out, own_lse, q.dtype)] * channel.size)


def _return_gradients(call: Call, q: Tensor, dq: Tensor) -> Pending[list[Bundle]]:
    channel = call.channel
    leaving = [
        [part] if rank == channel.rank else wire.encode(part, q.dtype)
        for rank, part in enumerate(dq.split(list(call.q_lengths), dim=1))
    ]
    specs = wire.specs(tuple(leaving[channel.rank][0].shape), q.dtype)
    return channel.exchange(leaving, [specs] * channel.size)


def _sum(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    total = torch.zeros(parts[0].shape, dtype=dtype, device=parts[0].device)
    for part in parts:
        total += part
    return total
