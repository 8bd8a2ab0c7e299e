"""The replicated schedule of lvx: every rank holds the same queries (decoding, resamplers)."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_lvx.attention.call import Call
from ds_lvx.attention.keys import Keys, Saved
from ds_lvx.kernels.merge import accumulation_dtype
from ds_lvx.kernels.rule import Rule


class Replicated:
    """Every rank holds the same queries: no query moves, parts are reduced by lse.

    What follows must be replicated as well: backward takes the same dout on every rank for
    granted, and gives every rank the whole dq.
    """

    def forward(self, call: Call, q: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        """See `ds_lvx.attention.schedules.Schedule.forward`.

        Sends the lse of a part, and out in fp32 by all-reduce.
        """
        keys.prepare()
        dtype = accumulation_dtype(q.dtype)
        out, lse = keys.attend(call, q, _rule(call))
        one_each = (1,) * call.channel.size
        (parts,) = call.channel.gather_rows([lse[None]], [0], one_each).wait()
        total = parts.logsumexp(dim=0)
        finite = total.masked_fill(total == -torch.inf, 0.0)
        weight = torch.exp(lse - finite).transpose(1, 2).unsqueeze(-1)
        return call.channel.all_reduce(out.to(dtype) * weight), total

    def backward(self, call: Call, saved: Saved, keys: Keys) -> Tensor:
        """See `ds_lvx.attention.schedules.Schedule.backward`. Sends dq in fp32 by all-reduce."""
        keys.prepare()
        dq = keys.gradients(call, saved, _rule(call))
        keys.finish()
        return call.channel.all_reduce(dq.to(accumulation_dtype(saved.q.dtype)))


def _rule(call: Call) -> Rule | None:
    """The queries, which every rank holds, over this rank's keys."""
    return call.layout.rule(queries=call.channel.rank, keys=call.channel.rank)
