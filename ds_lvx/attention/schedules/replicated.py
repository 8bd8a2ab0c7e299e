"""The replicated schedule of lvx: every rank holds the same queries (decoding, resamplers)."""

from __future__ import annotations

from torch import Tensor

from ds_lvx.attention.call import Call
from ds_lvx.attention.keys import Keys, Saved
from ds_lvx.attention.shape import goes_at_once
from ds_lvx.attention.witness import Witness
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.merge import (
    accumulation_dtype,
    empty_part,
    merge_stacked,
    per_row,
    weight_of,
)
from ds_lvx.kernels.rule import Rule


class Replicated:
    """Every rank holds the same queries: no query moves, parts are reduced by lse.

    What follows must be replicated as well: backward takes the same dout on every rank for
    granted, and gives every rank the whole dq.
    """

    def forward(self, call: Call, q: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        """See `ds_lvx.attention.schedules.Schedule.forward`.

        Of few queries the parts of out and lse are gathered as one message and merged on every
        rank; of many, lse is gathered, and out in fp32 summed by all-reduce. A witness of the call
        travels with what is gathered.
        """
        keys.prepare()
        out, lse = keys.attend(call, q, _rule(call))
        out = out.to(accumulation_dtype(q.dtype))
        if call.channel.size == 1:
            return out, lse
        outs, lses = _gather(call.channel, out, lse, call.witness)
        if outs is not None:
            return merge_stacked(outs, lses)
        total = lses.logsumexp(dim=0)
        return call.channel.all_reduce(out * per_row(weight_of(lse, total))), total

    def backward(self, call: Call, saved: Saved, keys: Keys) -> Tensor:
        """See `ds_lvx.attention.schedules.Schedule.backward`. Sends dq in fp32 by all-reduce."""
        keys.prepare()
        dq = keys.gradients(call, saved, _rule(call))
        keys.finish()
        return call.channel.all_reduce(dq.to(accumulation_dtype(saved.q.dtype)))


def say(channel: Channel, q: Tensor, witness: Witness) -> None:
    """Send a witness as a call with these queries would, without keys to attend to.

    A rank that stops calls it: where others go on, the message meets their next call.

    Args:
        channel: of the calls.
        q: like their queries; only its shape, dtype and device matter.
        witness: what this rank says; its ``compare`` hears the others.
    """
    _gather(channel, *empty_part(q, accumulation_dtype(q.dtype)), witness)


def _gather(
    channel: Channel, out: Tensor, lse: Tensor, witness: Witness | None
) -> tuple[Tensor | None, Tensor]:
    """The parts of all ranks, ``[n, ...]``; None for out where it is too large to be gathered."""
    at_once = goes_at_once(out.nbytes, channel.size)
    mine = [lse, *([out] if at_once else []), *([] if witness is None else [witness.numbers])]
    one_each = (1,) * channel.size
    arrived = channel.gather_rows([part[None] for part in mine], [0] * len(mine), one_each)
    lses, *others = arrived.wait()
    if witness is not None:
        witness.compare(others.pop())
    return (others[0] if at_once else None), lses


def _rule(call: Call) -> Rule | None:
    """The queries, which every rank holds, over this rank's keys."""
    return call.layout.rule(queries=call.channel.rank, keys=call.channel.rank)
