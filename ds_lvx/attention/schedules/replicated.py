"""The replicated schedule of lvx: every rank holds the same queries (decoding, resamplers)."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from ds_lvx.attention.call import Call
from ds_lvx.attention.keys import Keys, Saved
from ds_lvx.attention.shape import goes_at_once
from ds_lvx.attention.witness import Witness
from ds_lvx.distributed.alignment import padded
from ds_lvx.distributed.bundles import Spec, unpack_rows
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.merge import accumulation_dtype, empty_part, per_row, weight_of
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
        if call.channel.size == 1:
            return out, lse
        parts = Parts.of(call, q)
        if parts is not None:
            return parts.merged(out, lse, call.witness, wants_lse=call.wants_lse)
        out = out.to(accumulation_dtype(q.dtype))
        lses = _gather_lse(call.channel, lse, call.witness)
        total = lses.logsumexp(dim=0)
        return call.channel.all_reduce(out * per_row(weight_of(lse, total))), total

    def backward(self, call: Call, saved: Saved, keys: Keys) -> Tensor:
        """See `ds_lvx.attention.schedules.Schedule.backward`. Sends dq in fp32 by all-reduce."""
        keys.prepare()
        dq = keys.gradients(call, saved, _rule(call))
        keys.finish()
        return call.channel.all_reduce(dq.to(accumulation_dtype(saved.q.dtype)))


class Parts:
    """The message of few queries: out and lse of every rank, and what a witness says.

    Every token of a generation sends one like the last in every layer. So its buffers are kept, and
    where out and lse lie in them is found once: a part is written to its place, and merged from
    where it arrived.

    Args:
        channel: the ranks, two or more.
        q: like the queries ``[B, S, H, D]``; only its shape, dtype and device matter.
        numbers: of the witness; 0 without one.
        seen: every query sees a key of this rank.
    """

    def __init__(self, channel: Channel, q: Tensor, numbers: int = 0, *, seen: bool) -> None:
        dtype = accumulation_dtype(q.dtype)
        specs = [Spec((1, *q.shape[:3]), dtype), Spec((1, *q.shape), dtype)]
        specs += [Spec((1, numbers), torch.int64)] if numbers else []
        nbytes, first = sum(padded(spec.nbytes for spec in specs)), [0] * len(specs)
        with torch.inference_mode(False):  # or nothing outside of one could write to them
            self._sent, self._arrived = (
                torch.empty(rows, nbytes, dtype=torch.uint8, device=q.device)
                for rows in (channel.copies_of_shared(q.device), channel.size)
            )
            lse, *self._mine = unpack_rows(self._sent, specs, first)
            lses, outs, *self._said = unpack_rows(self._arrived, specs, first)
            self._weights = outs.new_empty(*lses.shape, 1)
        self._lse = lse.transpose(-1, -2)  # [..., H, S], as kernels have it
        self._lses = lses.transpose(-1, -2).unbind()
        self._rows = lses.unsqueeze(-1)
        self._weighed = list(zip(outs, self._weights, strict=True))
        self._channel = channel
        self._least = None if seen else torch.finfo(dtype).min

    @staticmethod
    def suffice(q: Tensor, channel: Channel) -> bool:
        """Whether the parts of these queries are gathered whole; else they are too large."""
        return goes_at_once(q.numel() * accumulation_dtype(q.dtype).itemsize, channel.size)

    @classmethod
    def of(cls, call: Call, q: Tensor) -> Parts | None:
        """Those of a call, which calls of the same layout with queries like its own share; None
        where they do not `suffice`."""
        numbers = 0 if call.witness is None else call.witness.numbers.numel()
        kind = ("parts", q.shape, q.dtype, numbers)
        return call.layout.settled(kind, lambda: cls._made(call, q, numbers))

    @classmethod
    def _made(cls, call: Call, q: Tensor, numbers: int) -> Parts | None:
        if not cls.suffice(q, call.channel):
            return None
        seen = call.kv_lengths[call.channel.rank] > 0 and _rule(call) is None
        return cls(call.channel, q, numbers, seen=seen)

    def merged(
        self,
        out: Tensor,
        lse: Tensor,
        witness: Witness | None = None,
        *,
        wants_lse: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Send this rank's part, and merge those of all.

        Args:
            out: ``[B, S, H, D]``, of any dtype.
            lse: ``[B, H, S]``.
            witness: its ``compare`` hears what all ranks said.
            wants_lse: merge lse as well.

        Returns:
            out and lse over all keys, in fp32 (fp64 for fp64); lse of this rank alone without
            ``wants_lse``.

        Collectives: one all-gather of both, and of the witness's numbers.
        """
        self._lse.copy_(lse)
        self._mine[0].copy_(out)
        if witness is not None:
            self._mine[1].copy_(witness.numbers)
        self.share()
        if witness is not None:
            witness.compare(self._said[0])
        total = reduce(torch.logaddexp, self._lses) if wants_lse else lse
        if self._least is not None:  # outs of rows that nobody sees are 0: any weights but NaN do
            self._rows.clamp_min_(self._least)
        torch.softmax(self._rows, dim=0, out=self._weights)
        (first, weight), *others = self._weighed
        merged = first * weight
        for each, weight in others:
            merged.addcmul_(each, weight)
        return merged, total

    def share(self) -> None:
        """The bare collective: what is in this rank's buffer, to all."""
        self._channel.share(self._sent, self._arrived)


def say(channel: Channel, q: Tensor, witness: Witness) -> None:
    """Send a witness as a call with these queries would, without keys to attend to.

    A rank that stops calls it: where others go on, the message meets their next call.

    Args:
        channel: of the calls.
        q: like their queries; only its shape, dtype and device matter.
        witness: what this rank says; its ``compare`` hears the others.
    """
    out, lse = empty_part(q, accumulation_dtype(q.dtype))
    if Parts.suffice(q, channel):
        Parts(channel, q, witness.numbers.numel(), seen=False).merged(out, lse, witness)
    else:
        _gather_lse(channel, lse, witness)


def _gather_lse(channel: Channel, lse: Tensor, witness: Witness | None) -> Tensor:
    """lse of all ranks, ``[n, B, H, S]``."""
    mine = [lse, *([] if witness is None else [witness.numbers])]
    one_each = (1,) * channel.size
    arrived = channel.gather_rows([part[None] for part in mine], [0] * len(mine), one_each)
    lses, *others = arrived.wait()
    if witness is not None:
        witness.compare(others.pop())
    return lses


def _rule(call: Call) -> Rule | None:
    """The queries, which every rank holds, over this rank's keys."""
    return call.layout.rule(queries=call.channel.rank, keys=call.channel.rank)
