"""This rank's keys and values as a schedule sees them: it attends to them, and asks for gradients.

Where K and V come from, and whether they ever exist whole, is no business of a schedule's.

Legend: B batch, S queries, T keys of this rank, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from ds_lvx.attention.call import Call
from ds_lvx.attention.projection import Part, Projection
from ds_lvx.distributed.bundles import Bundle
from ds_lvx.kernels.interface import Upstream
from ds_lvx.kernels.merge import accumulation_dtype, empty_part
from ds_lvx.kernels.rule import Rule

Source: TypeAlias = Callable[[], tuple[Tensor, Tensor]]
Sink: TypeAlias = Callable[[list[Tensor]], None]


@dataclass(frozen=True)
class Saved:
    """What backward starts from: q, dout ``[B, s, H, D]``; lse, delta ``[B, H, s]``; s queries.

    ``out`` stays at home: ``delta`` is all that a block needs of it.
    """

    q: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor

    def of_heads(self, heads: slice) -> Saved:
        """The same for some of the heads."""
        return Saved(
            self.q[:, :, heads], self.dout[:, :, heads], self.lse[:, heads], self.delta[:, heads]
        )

    def bundle(self) -> Bundle:
        """The tensors that travel."""
        return [self.q, self.dout.to(self.q.dtype), self.lse, self.delta]


class Keys(Protocol):
    """Keys and values of one rank, for one forward or one backward.

    Some of the heads can be attended to, and asked for gradients, by themselves: ``heads`` are
    those of K and V, and the queries come with the heads that use them.
    """

    @property
    def kv_heads(self) -> int | None:
        """Heads of K and V; None where heads cannot be had by themselves."""
        ...

    def prepare(self) -> None:
        """Make K and V, or the first of them; called once, with a transfer under way."""
        ...

    def attend(
        self, call: Call, q: Tensor, rule: Rule | None, *, heads: slice | None = None
    ) -> tuple[Tensor, Tensor]:
        """``out [B, S, H, D]`` and ``lse [B, H, S]`` of queries ``q`` over these keys alone."""
        ...

    def gradients(
        self, call: Call, rows: Saved, rule: Rule | None, *, heads: slice | None = None
    ) -> Tensor:
        """These keys' part of dq ``[B, S, H, D]``; their own gradients add up in here.

        With ``heads`` all heads must have their turn, once each, before ``finish``.
        """
        ...

    def finish(self) -> None:
        """Hand the keys' gradients on; called once, with a transfer under way."""
        ...


class WholeKeys:
    """K and V whole, from a source; every schedule can attend to them, in several calls.

    Args:
        source: makes K and V ``[B, T, K, D]``.
        sink: takes ``[dk, dv]`` in the keys' dtype, and may empty the list to let go of them.
        kv_heads: K, where the source has it before it runs.
    """

    def __init__(
        self, source: Source, sink: Sink | None = None, *, kv_heads: int | None = None
    ) -> None:
        self._source = source
        self._sink = sink
        self._kv_heads = kv_heads
        self._keys: tuple[Tensor, Tensor] | None = None
        self._totals: tuple[Tensor, Tensor] | None = None

    @property
    def kv_heads(self) -> int | None:
        """See `Keys.kv_heads`."""
        return self._kv_heads

    def prepare(self) -> None:
        """See `Keys.prepare`."""
        self._keys = self._source()

    def attend(
        self, call: Call, q: Tensor, rule: Rule | None, *, heads: slice | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Keys.attend`."""
        partial = call.channel.size > 1
        return call.kernel.forward(call.problem(q, *self._of(heads), rule, partial=partial))

    def gradients(
        self, call: Call, rows: Saved, rule: Rule | None, *, heads: slice | None = None
    ) -> Tensor:
        """See `Keys.gradients`. Over several calls for all heads dk and dv add up in fp32."""
        if heads is not None:
            if self._totals is None:
                assert self._keys is not None
                k, v = self._keys
                self._totals = k.new_empty(k.shape), v.new_empty(v.shape)
            dk, dv = (total[:, :, heads] for total in self._totals)
            return _backward(call, rows, self._of(heads), rule, into=(dk, dv))[0]
        dq, dk, dv = _backward(call, rows, self._of(None), rule)
        if self._totals is None:
            self._totals = (dk, dv)
        else:
            wide = accumulation_dtype(dk.dtype)
            old_dk, old_dv = self._totals
            self._totals = (old_dk.to(wide).add_(dk), old_dv.to(wide).add_(dv))
        return dq

    def _of(self, heads: slice | None) -> tuple[Tensor, Tensor]:
        assert self._keys is not None
        k, v = self._keys
        return (k, v) if heads is None else (k[:, :, heads], v[:, :, heads])

    def finish(self) -> None:
        """See `Keys.finish`."""
        assert self._keys is not None
        assert self._totals is not None
        assert self._sink is not None
        pairs = zip(self._totals, self._keys, strict=True)
        gradients = [gradient.to(key.dtype) for gradient, key in pairs]
        del pairs
        self._keys = self._totals = None  # the sink needs the room
        self._sink(gradients)


class ChunkedKeys:
    """K and V projected and attended to chunk by chunk, so that they never exist whole.

    Only for schedules that bring all queries at once (gather, replicated).

    Args:
        projection: of this forward or backward.
    """

    def __init__(self, projection: Projection) -> None:
        self._projection = projection
        self._parts = projection.parts()
        self._first: Part | None = None
        self._last: list[Tensor] | None = None

    @property
    def kv_heads(self) -> None:
        """See `Keys.kv_heads`: a chunk is projected once, for all heads."""
        return

    def prepare(self) -> None:
        """See `Keys.prepare`: the first chunk."""
        self._first = next(self._parts)

    def attend(
        self, call: Call, q: Tensor, rule: Rule | None, *, heads: slice | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Keys.attend`. Chunks are merged in fp32."""
        assert heads is None
        out, lse = empty_part(q, accumulation_dtype(q.dtype))
        part, self._first = self._first, None
        while part is not None:
            problem = call.problem(q, part.k, part.v, _of_part(rule, part), partial=True)
            call.kernel.fold(problem, (out, lse))
            del problem
            part = None  # before the next one is made
            part = next(self._parts, None)
        return out, lse

    def gradients(
        self, call: Call, rows: Saved, rule: Rule | None, *, heads: slice | None = None
    ) -> Tensor:
        """See `Keys.gradients`. All chunks but the last go through the projection at once."""
        assert heads is None
        dq = torch.zeros(rows.q.shape, dtype=accumulation_dtype(rows.q.dtype), device=rows.q.device)
        part, self._first = self._first, None
        while part is not None:
            seen = _of_part(rule, part)
            part_dq, *gradients = _backward(call, rows, (part.k, part.v), seen)
            dq += part_dq
            last, part = part.last, None  # the projection's backward needs the room
            if last:
                self._last = gradients
            else:
                self._projection.push(gradients, last=False)
            part = next(self._parts, None)
        return dq

    def finish(self) -> None:
        """See `Keys.finish`: the last chunk's gradients, and with them the parameters'."""
        assert self._last is not None
        self._projection.push(self._last, last=True)


def _of_part(rule: Rule | None, part: Part) -> Rule | None:
    return None if rule is None else rule.part(keys=part.tokens)


def _backward(
    call: Call,
    rows: Saved,
    keys: tuple[Tensor, Tensor],
    rule: Rule | None,
    *,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    upstream = Upstream(rows.dout, rows.lse, rows.delta, has_dlse=call.returns_lse)
    return call.kernel.backward(call.problem(rows.q, *keys, rule), upstream, into=into)
