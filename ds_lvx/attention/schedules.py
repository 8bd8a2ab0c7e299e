"""The schedules of lvx: how queries meet the keys of every rank while the keys stay at home.

A schedule is a pair of functions. Both take this rank's keys as `Keys`, and call ``prepare`` once
the first transfer is under way, so that a projection which it runs hides that transfer. Backward
calls ``finish`` while the last transfer of dq is under way, for the same reason.

Legend: n ranks, s this rank's queries, H heads, D head_dim, e bytes an element. Forward sends
``(n - 1) s H (2 D e + 4)`` bytes a rank, backward ``(n - 1) s H (3 D e + 8)``, and each
``8 (n - 1) s`` for visibility, in ``ring`` and in ``gather`` alike (LV-XAttn, arXiv:2502.02406,
section 3).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ds_lvx.attention import wire
from ds_lvx.attention.call import Call
from ds_lvx.attention.gather import Gather
from ds_lvx.attention.keys import Keys, Saved
from ds_lvx.distributed.bundles import Bundle, Spec
from ds_lvx.distributed.pending import Pending
from ds_lvx.kernels.merge import accumulation_dtype, merge_
from ds_lvx.kernels.visibility import Visibility


class Schedule(Protocol):
    """Moves queries."""

    def forward(
        self, call: Call, q: Tensor, visibility: Visibility | None, keys: Keys
    ) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` of this rank's queries over all ranks' keys, both in fp32."""
        ...

    def backward(
        self, call: Call, saved: Saved, visibility: Visibility | None, keys: Keys
    ) -> Tensor:
        """dq of this rank's queries, in fp32."""
        ...


class Ring:
    """The paper's: query shards rotate. Each block's part goes straight home and is merged there.

    While a kernel runs, the next queries are on their way here and the last part on its way home;
    only the very last part has no kernel to hide under (in backward it has the projection's own).
    The paper lets parts rotate and merge on the way, for the same bytes; then every hop rounds
    the running result to 16 bits, where here every part is rounded once and merged in fp32.
    """

    def forward(
        self, call: Call, q: Tensor, visibility: Visibility | None, keys: Keys
    ) -> tuple[Tensor, Tensor]:
        """See `Schedule.forward`."""
        channel, dtype = call.channel, accumulation_dtype(q.dtype)
        queries: Bundle = [q, *_ranges(visibility)]
        home: list[Tensor] = []
        returning: Pending[Bundle] | None = None
        for step in range(channel.size):
            following = _next_queries(call, queries, step, visibility)
            if step == 0:
                keys.prepare()
            out, lse = keys.attend(call, queries[0], _under(visibility, queries, 1))
            if step == 0:
                home = [out.to(dtype), lse.to(dtype)]
            else:
                if returning is not None:
                    merge_(home[0], home[1], *_decode_part(returning.wait()))
                part = _encode_part(out, lse, q.dtype)
                returning = channel.shift(part, _part_specs(home[0], home[1], q.dtype), hops=-step)
            if following is not None:
                queries = following.wait()
        if returning is not None:
            merge_(home[0], home[1], *_decode_part(returning.wait()))
        return home[0], home[1]

    def backward(
        self, call: Call, saved: Saved, visibility: Visibility | None, keys: Keys
    ) -> Tensor:
        """See `Schedule.backward`."""
        channel, q = call.channel, saved.q
        moving: Bundle = [*saved.bundle(), *_ranges(visibility)]
        home = torch.zeros(q.shape, dtype=accumulation_dtype(q.dtype), device=q.device)
        returning: Pending[Bundle] | None = None
        for step in range(channel.size):
            following = _next_queries(call, moving, step, visibility, saved=saved)
            if step == 0:
                keys.prepare()
            dq = keys.gradients(call, Saved(*moving[:4]), _under(visibility, moving, 4))
            if step == 0:
                home += dq
            else:
                if returning is not None:
                    home += wire.decode(returning.wait())
                part = wire.encode(dq, q.dtype)
                returning = channel.shift(part, wire.specs(tuple(q.shape), q.dtype), hops=-step)
            if following is not None:
                moving = following.wait()
        keys.finish()
        if returning is not None:
            home += wire.decode(returning.wait())
        return home


class Replicated:
    """Every rank holds the same queries: no query moves, parts are reduced by lse.

    What follows must be replicated as well: backward takes the same dout on every rank for
    granted, and gives every rank the whole dq.
    """

    def forward(
        self, call: Call, q: Tensor, visibility: Visibility | None, keys: Keys
    ) -> tuple[Tensor, Tensor]:
        """See `Schedule.forward`. Sends the lse of a part, and out in fp32 by all-reduce."""
        keys.prepare()
        dtype = accumulation_dtype(q.dtype)
        out, lse = keys.attend(call, q, visibility)
        specs = [[Spec.of(lse)]] * call.channel.size
        parts = torch.stack([part for (part,) in call.channel.gather([lse], specs).wait()])
        total = parts.logsumexp(dim=0)
        finite = total.masked_fill(total == -torch.inf, 0.0)
        weight = torch.exp(lse - finite).transpose(1, 2).unsqueeze(-1)
        return call.channel.all_reduce(out.to(dtype) * weight), total

    def backward(
        self, call: Call, saved: Saved, visibility: Visibility | None, keys: Keys
    ) -> Tensor:
        """See `Schedule.backward`. Sends dq in fp32 by all-reduce."""
        keys.prepare()
        dq = keys.gradients(call, saved, visibility)
        keys.finish()
        return call.channel.all_reduce(dq.to(accumulation_dtype(saved.q.dtype)))


SCHEDULES: dict[str, Schedule] = {
    "ring": Ring(),
    "gather": Gather(),
    "replicated": Replicated(),
}


# --------------------------------------------------------------------------------------------
# What goes round the ring, and its shape


def _next_queries(
    call: Call,
    mine: Bundle,
    step: int,
    visibility: Visibility | None,
    *,
    saved: Saved | None = None,
) -> Pending[Bundle] | None:
    """Start to pass the rows at hand on and to receive the next ones; None at the last step."""
    if step == call.channel.size - 1:
        return None
    owner = (call.channel.rank - step - 1) % call.channel.size
    if saved is None:
        specs = _query_specs(call, mine[0], visibility, owner)
    else:
        specs = _gradient_specs(call, saved, visibility, owner)
    return call.channel.shift(mine, specs)


def _under(visibility: Visibility | None, bundle: Bundle, index: int) -> Visibility | None:
    return None if visibility is None else visibility.with_queries(bundle[index])


def _ranges(visibility: Visibility | None) -> Bundle:
    """The visibility of queries, as it travels with them."""
    return [] if visibility is None else [visibility.ranges]


def _query_specs(call: Call, q: Tensor, visibility: Visibility | None, rank: int) -> list[Spec]:
    """What another rank's queries look like."""
    queries = _rows_like(q, call.q_lengths[rank], dim=1)
    return [queries, *_range_specs(call, q, visibility, rank)]


def _gradient_specs(
    call: Call, saved: Saved, visibility: Visibility | None, rank: int
) -> list[Spec]:
    """What another rank's queries look like in backward, with dout, lse and delta."""
    length = call.q_lengths[rank]
    queries = _rows_like(saved.q, length, dim=1)
    statistics = [_rows_like(saved.lse, length, dim=2), _rows_like(saved.delta, length, dim=2)]
    return [queries, queries, *statistics, *_range_specs(call, saved.q, visibility, rank)]


def _encode_part(out: Tensor, lse: Tensor, dtype: torch.dtype) -> Bundle:
    """A part on its way home."""
    return [lse, *wire.encode(out, dtype)]


def _part_specs(out: Tensor, lse: Tensor, dtype: torch.dtype) -> list[Spec]:
    """What a part of this rank's own rows looks like on its way home.

    Args:
        out, lse: of the same rows and heads.
        dtype: q's.
    """
    return [Spec.of(lse), *wire.specs(tuple(out.shape), dtype)]


def _decode_part(bundle: Bundle) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of a part that arrived."""
    return wire.decode(bundle[1:]), bundle[0]


def _rows_like(tensor: Tensor, length: int, *, dim: int) -> Spec:
    shape = list(tensor.shape)
    shape[dim] = length
    return Spec(tuple(shape), tensor.dtype)


def _range_specs(call: Call, q: Tensor, visibility: Visibility | None, rank: int) -> list[Spec]:
    if visibility is None:
        return []
    return [Spec((2, q.shape[0], call.q_lengths[rank]), torch.int32)]
