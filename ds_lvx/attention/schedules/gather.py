"""The gather schedule of lvx: queries come together on every rank, parts of the result go home.

Large messages go by groups of heads: while some heads are computed, the queries of the next ones
arrive and the parts of the last ones go home. A kernel reads the keys of each head once either way,
so that groups one after the other take no longer than all heads at once. Only the first group's
queries and the last group's parts have no kernel to hide under, hence these two are small.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from ds_lvx.attention import wire
from ds_lvx.attention.call import Call
from ds_lvx.attention.heads import rejoined
from ds_lvx.attention.keys import Keys, Saved
from ds_lvx.attention.shape import head_groups, head_slices
from ds_lvx.distributed.bundles import Bundle, Unwritten
from ds_lvx.distributed.pending import Pending
from ds_lvx.kernels.rule import Rule

# Which dimension of a tensor has the queries.
_OF_Q, _OF_LSE = 1, 2


class Gather:
    """All-gather the queries, one kernel over all of them, scatter-reduce the parts by lse."""

    def forward(self, call: Call, q: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        """See `ds_lvx.attention.schedules.Schedule.forward`."""
        rule = _rule(call)
        if call.channel.size == 1:
            keys.prepare()
            return keys.attend(call, q, rule)
        groups = _groups(call, q, keys)
        arriving = _gather_queries(call, q, groups[0])
        keys.prepare()
        returning = []
        for index, group in enumerate(groups):
            (everyone,) = arriving.wait()
            if index + 1 < len(groups):
                arriving = _gather_queries(call, q, groups[index + 1])
            out, lse = keys.attend(call, everyone, rule, heads=group[1])
            del everyone  # what was gathered, before there is a message as large
            returning.append(_Part(call, out, lse, dtype=q.dtype))
            del out, lse
        outs, lses = zip(*[part.merged() for part in returning], strict=True)
        return rejoined(outs, dim=2), rejoined(lses, dim=1)

    def backward(self, call: Call, saved: Saved, keys: Keys) -> Tensor:
        """See `ds_lvx.attention.schedules.Schedule.backward`."""
        rule = _rule(call)
        if call.channel.size == 1:
            keys.prepare()
            dq = keys.gradients(call, saved, rule)
            keys.finish()
            return dq
        groups = _groups(call, saved.q, keys)
        arriving = _gather_gradients(call, saved, groups[0])
        keys.prepare()
        returning = []
        for index, group in enumerate(groups):
            q, dout, lse, delta = arriving.wait()
            if index + 1 < len(groups):
                arriving = _gather_gradients(call, saved, groups[index + 1])
            dq = keys.gradients(call, Saved(q, dout, lse, delta), rule, heads=group[1])
            del q, dout, lse, delta
            returning.append(_GradientPart(call, dq, dtype=saved.q.dtype))
            del dq  # the projection's backward needs the room
        keys.finish()
        return rejoined([part.summed() for part in returning], dim=2)


# --------------------------------------------------------------------------------------------
# Heads


# Neighbouring heads that travel and are attended to together: of q; and of K and V, None for all,
# however many these are.
_Group: TypeAlias = tuple[slice, slice | None]


def _groups(call: Call, q: Tensor, keys: Keys) -> list[_Group]:
    """The groups, the same on every rank, in forward and in backward."""
    batch, _, heads, head_dim = q.shape
    if keys.kv_heads is None:
        return [(slice(None), None)]
    sizes = head_groups(
        kv_heads=keys.kv_heads,
        q_bytes=batch * max(call.q_lengths) * heads * head_dim * q.element_size(),
        on_cpu=q.device.type == "cpu",
    )
    if len(sizes) == 1:
        return [(slice(None), None)]
    return [*head_slices(sizes, heads // keys.kv_heads)]


# --------------------------------------------------------------------------------------------
# Out


def _rule(call: Call) -> Rule | None:
    """Everyone's queries over this rank's keys."""
    return call.layout.rule(queries=None, keys=call.channel.rank)


def _gather_queries(call: Call, q: Tensor, group: _Group) -> Pending[Bundle]:
    return call.channel.gather_rows([q[:, :, group[0]]], [_OF_Q], call.q_lengths)


def _gather_gradients(call: Call, saved: Saved, group: _Group) -> Pending[Bundle]:
    dims = [_OF_Q, _OF_Q, _OF_LSE, _OF_LSE]
    return call.channel.gather_rows(saved.of_heads(group[0]).bundle(), dims, call.q_lengths)


# --------------------------------------------------------------------------------------------
# Home


class _GradientPart:
    """A part of dq on its way home. This rank's own rows stay as they are, unrounded."""

    def __init__(self, call: Call, dq: Tensor, *, dtype: torch.dtype) -> None:
        self._rank = call.channel.rank
        self._own = _own_rows(call, dq, _OF_Q)
        self._arriving = _exchange(call, wire.to_send(dq, dtype))

    def summed(self) -> Tensor:
        """The sum over all ranks' keys, in fp32."""
        return wire.joined(self._arriving.wait(), self._own, self._rank)[0]


class _Part:
    """A part of out and lse on its way home."""

    def __init__(self, call: Call, out: Tensor, lse: Tensor, *, dtype: torch.dtype) -> None:
        self._rank = call.channel.rank
        self._own = _own_rows(call, out, _OF_Q)
        self._arriving = _exchange(call, wire.to_send(out, dtype, lse), lse=True)

    def merged(self) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` over all ranks' keys, in fp32."""
        arrived, *encoded = self._arriving.wait()
        out, lse = wire.joined(encoded, self._own, self._rank, arrived)
        assert lse is not None
        return out, lse


def _exchange(call: Call, part: Unwritten, *, lse: bool = False) -> Pending[Bundle]:
    dims = [_OF_LSE] * lse + [_OF_Q] * (len(part.specs) - lse)
    return call.channel.exchange_rows(part, dims, call.q_lengths)


def _own_rows(call: Call, tensor: Tensor, dim: int) -> Tensor:
    """A copy: the tensor, in fp32, has everyone's rows and need not wait for those of others."""
    rank = call.channel.rank
    return tensor.narrow(dim, sum(call.q_lengths[:rank]), call.q_lengths[rank]).clone()
