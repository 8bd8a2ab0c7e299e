"""The ring schedule of lvx, the paper's: query shards rotate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_lvx.attention import wire
from ds_lvx.attention.call import Call
from ds_lvx.attention.keys import Keys, Saved
from ds_lvx.distributed.bundles import Bundle, Spec
from ds_lvx.distributed.pending import Pending
from ds_lvx.kernels.late_triton import launches_triton
from ds_lvx.kernels.merge import accumulation_dtype, merge_
from ds_lvx.kernels.rule import Rule

# Which dimension of a tensor has the queries.
_OF_Q, _OF_LSE = 1, 2


class Ring:
    """The paper's: query shards rotate. Each block's part goes straight home and is merged there.

    While a kernel runs, the next queries are on their way here and the last part on its way home;
    only the very last part has no kernel to hide under (in backward it has the projection's own).
    The paper lets parts rotate and merge on the way, for the same bytes; then every hop rounds
    the running result to 16 bits, where here every part is rounded once and merged in fp32.
    """

    def forward(self, call: Call, q: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        """See `ds_lvx.attention.schedules.Schedule.forward`."""
        channel, dtype = call.channel, accumulation_dtype(q.dtype)
        queries: Bundle = [q]
        home: list[Tensor] = []
        returning: Pending[Bundle] | None = None
        for step in range(channel.size):
            following = _next_rows(call, queries, step, dims=[_OF_Q])
            if step == 0:
                keys.prepare()
            out, lse = keys.attend(call, queries[0], _rule(call, step))
            if step == 0:
                home = [out.to(dtype), lse.to(dtype)]
            else:
                if returning is not None:
                    home = _merged(home, returning.wait())
                part = _encode_part(out, lse, q.dtype)
                returning = channel.shift(part, _part_specs(home[0], home[1], q.dtype), hops=-step)
            if following is not None:
                queries = following.wait()
        if returning is not None:
            home = _merged(home, returning.wait())
        return home[0], home[1]

    def backward(self, call: Call, saved: Saved, keys: Keys) -> Tensor:
        """See `ds_lvx.attention.schedules.Schedule.backward`."""
        channel, q = call.channel, saved.q
        moving = saved.bundle()
        home = torch.zeros(q.shape, dtype=accumulation_dtype(q.dtype), device=q.device)
        returning: Pending[Bundle] | None = None
        for step in range(channel.size):
            following = _next_rows(call, moving, step, dims=[_OF_Q, _OF_Q, _OF_LSE, _OF_LSE])
            if step == 0:
                keys.prepare()
            dq = keys.gradients(call, Saved(*moving), _rule(call, step))
            if step == 0:
                home += dq
            else:
                if returning is not None:
                    home = _sum(home, returning.wait())
                part = wire.encode(dq, q.dtype)
                returning = channel.shift(part, wire.specs(tuple(q.shape), q.dtype), hops=-step)
            if following is not None:
                moving = following.wait()
        keys.finish()
        if returning is not None:
            home = _sum(home, returning.wait())
        return home


def _owner(call: Call, step: int) -> int:
    """Whose queries are here at a step."""
    return (call.channel.rank - step) % call.channel.size


def _rule(call: Call, step: int) -> Rule | None:
    """The queries that are here over this rank's keys."""
    return call.layout.rule(queries=_owner(call, step), keys=call.channel.rank)


def _next_rows(
    call: Call, mine: Bundle, step: int, *, dims: Sequence[int]
) -> Pending[Bundle] | None:
    """Start to pass the rows at hand on and to receive the next ones; None at the last step.

    Args:
        mine: tensors of the same queries.
        dims: which dimension of each has the queries.
    """
    if step == call.channel.size - 1:
        return None
    length = call.q_lengths[_owner(call, step + 1)]
    return call.channel.shift(
        mine, [_rows_like(t, length, d) for t, d in zip(mine, dims, strict=True)]
    )


def _rows_like(tensor: Tensor, length: int, dim: int) -> Spec:
    """What another rank's rows look like."""
    shape = list(tensor.shape)
    shape[dim] = length
    return Spec(tuple(shape), tensor.dtype)


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


def _merged(home: list[Tensor], arrived: Bundle) -> list[Tensor]:
    """``[out, lse]`` so far, and a part that arrived."""
    lse, *encoded = arrived
    if _by_one_launch(home[0]):
        both = torch.stack((home[1], lse))
        out, total = wire.joined(_twice(encoded), home[0], 0, both)
        assert total is not None
        return [out, total]
    merge_(home[0], home[1], wire.decode(encoded), lse)
    return home


def _sum(home: Tensor, arrived: Bundle) -> Tensor:
    """dq so far, and a part of it that arrived."""
    if _by_one_launch(home):
        return wire.joined(_twice(arrived), home, 0)[0]
    return home.add_(wire.decode(arrived))


def _by_one_launch(home: Tensor) -> bool:
    return launches_triton(home) and home.dtype == torch.float32


def _twice(encoded: Bundle) -> Bundle:
    """A part as one of two; the first place is that of what is at home."""
    return [tensor.expand(2, *tensor.shape) for tensor in encoded]
