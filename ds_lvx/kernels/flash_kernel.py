"""The ``flash`` kernel: FlashAttention as PyTorch has it, under any rule that slices make up.

The rule's `Cover` says which slices; each is one call. Results of queries that are in several
merge by lse in fp32. Given the softmax over all keys, gradients of slices add up; what only one
slice has is written as it comes. On a CPU the calls are PyTorch's flash kernel for CPUs, so that
tests run this very code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_lvx.kernels import flash, flash_varlen, whole
from ds_lvx.kernels.cover import Cover, Order, Rectangle, Sequences
from ds_lvx.kernels.covering import MOST_LARGE_CALLS
from ds_lvx.kernels.interface import Kernel, Problem, Upstream, no_gradients, written
from ds_lvx.kernels.merge import accumulation_dtype, empty_part, merge_
from ds_lvx.kernels.native import NativeKernel


def obstacle(q: Tensor) -> str | None:
    """Why PyTorch's flash kernel cannot do queries like ``q``; None where it can."""
    if q.device.type == "cpu" or flash.cuda_can(q):
        return None
    return (
        f"{q.dtype} with head_dim {q.shape[-1]} on {q.device.type}, where it does 16 bits and 8, "
        f"16, ... {flash.CUDA_MAX_HEAD_DIM}, from compute capability 8.0 on"
    )


class FlashKernel(Kernel):
    """FlashAttention, slice by slice; what it does not serve, ``native`` does. Stateless."""

    name = "flash"

    _call = staticmethod(flash.forward)
    _call_backward = staticmethod(flash.backward)
    _has_sequences = True

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        """One slice, by `ds_lvx.kernels.whole`."""
        return whole.forward(self._call, q, k, v, **how)

    def _gradients(
        self, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor, **how: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Those of `_attend`; ``rest`` is dout, out and lse."""
        return whole.backward(self._call_backward, (q, k, v), *rest, **how)

    def serves(self, problem: Problem, upstream: Upstream | None = None) -> bool:
        """Whether these calls can do it: slices make up the rule, and lse has no gradient."""
        cover = problem.cover
        return (
            cover is not None
            and (self._has_sequences or len(cover.rectangles) <= MOST_LARGE_CALLS)
            and (upstream is None or not upstream.has_dlse)
        )

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """See `ds_lvx.kernels.interface.Kernel.forward`."""
        cover, q = problem.cover, problem.q
        if cover is None:
            return NativeKernel().forward(problem)
        if cover.is_one_call:
            (one,) = cover.inner
            scale = problem.softmax_scale
            return self._attend(q, problem.k, problem.v, causal=one.causal, softmax_scale=scale)
        if self._sequences(cover) is not None and cover.queries is None:
            return self._attend_sequences(problem, cover)
        out, lse = empty_part(q, accumulation_dtype(q.dtype))
        if not cover.merges:
            out = torch.zeros_like(q)  # each query's result is rounded already
        self._run(problem, cover, (out, lse), fresh=True)
        return out, lse

    def fold(self, problem: Problem, running: tuple[Tensor, Tensor]) -> None:
        """See `ds_lvx.kernels.interface.Kernel.fold`; slice by slice."""
        cover = problem.cover
        if cover is None:
            NativeKernel().fold(problem, running)
        elif cover.queries is not None:
            merge_(*running, *self.forward(problem))
        else:
            self._run(problem, cover, running, fresh=False)

    def backward(
        self,
        problem: Problem,
        upstream: Upstream,
        *,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ds_lvx.kernels.interface.Kernel.backward`."""
        cover, q, k, v = problem.cover, problem.q, problem.k, problem.v
        if cover is None or upstream.has_dlse:
            return NativeKernel().backward(problem, upstream, into=into)
        if not cover.rectangles:
            return no_gradients(problem, into, q.dtype)
        dout = upstream.dout.to(q.dtype)
        rows = (q, dout, flash.stand_in(dout, upstream.delta), upstream.lse.transpose(1, 2))
        if cover.is_one_call:
            dq, *gradients = self._backward(cover.inner[0], rows, (k, v), problem.softmax_scale)
            return dq, *written((gradients[0], gradients[1]), into)
        wide = accumulation_dtype(q.dtype)
        dq = torch.zeros(q.shape, dtype=wide if cover.merges else q.dtype, device=q.device)
        dk, dv = into or (torch.empty_like(k), torch.empty_like(v))
        # The sum of two is rounded once, whoever adds them; of more, each time in 16 bits.
        sums = [torch.zeros_like(k, dtype=wide) for _ in range(2)] if cover.is_deep else [dk, dv]
        for total in sums:
            total.zero_()
        self._add(cover, rows, (k, v), (dq, *sums), problem.softmax_scale)
        if cover.is_deep:
            dk.copy_(sums[0])
            dv.copy_(sums[1])
        return dq, dk, dv

    def _run(
        self, problem: Problem, cover: Cover, running: tuple[Tensor, Tensor], *, fresh: bool
    ) -> None:
        """Merge every rectangle into a result; a ``fresh`` one is nothing yet, and written over."""
        out, lse = running
        q, k, v = problem.q, problem.k, problem.v
        scale, inner = problem.softmax_scale, running
        if self._sequences(cover) is not None:
            inner = self._attend_sequences(problem, cover)
            if cover.queries is None:
                merge_(out, lse, *inner)
        else:
            inner_q = _taken(cover.queries, q)
            if cover.queries is not None:
                inner = empty_part(inner_q, accumulation_dtype(q.dtype))
            tensors = (inner_q, _taken(cover.keys, k), _taken(cover.keys, v))
            self._merge(cover.inner, tensors, inner, scale, fresh=fresh)
        if cover.queries is not None:
            cover.queries.put(out, inner[0])
            cover.queries.put(lse.transpose(1, 2), inner[1].transpose(1, 2))
        self._merge(cover.whole, (q, k, v), running, scale, fresh=fresh)

    def _sequences(self, cover: Cover) -> Sequences | None:
        """The cover as one launch, where this kernel has such a thing."""
        return cover.sequences if self._has_sequences else None

    def _attend_sequences(self, problem: Problem, cover: Cover) -> tuple[Tensor, Tensor]:
        """Results of the queries that the cover gathers."""
        assert cover.sequences is not None
        q = _taken(cover.queries, problem.q)
        k, v = (_taken(cover.keys, t) for t in (problem.k, problem.v))
        scale = problem.softmax_scale
        return flash_varlen.forward(q, k, v, cover.sequences, softmax_scale=scale)

    def _merge(
        self,
        rectangles: Sequence[Rectangle],
        tensors: tuple[Tensor, Tensor, Tensor],
        running: tuple[Tensor, Tensor],
        softmax_scale: float,
        *,
        fresh: bool,
    ) -> None:
        q, k, v = tensors
        for each in rectangles:
            out, lse = _queries_of(each, running[0]), running[1][each.batch, :, each.queries]
            part = self._attend(
                _queries_of(each, q),
                _keys_of(each, k),
                _keys_of(each, v),
                causal=each.causal,
                softmax_scale=softmax_scale,
            )
            if fresh and each.sole_queries:
                out.copy_(part[0])
                lse.copy_(part[1])
            else:
                merge_(out, lse, *part)

    def _add(
        self,
        cover: Cover,
        rows: tuple[Tensor, ...],
        keys: tuple[Tensor, Tensor],
        sums: tuple[Tensor, ...],
        softmax_scale: float,
    ) -> None:
        """Add the gradients of every rectangle to zeros."""
        inner_rows = tuple(_taken(cover.queries, t) for t in rows)
        inner_keys = tuple(_taken(cover.keys, t) for t in keys)
        orders = (cover.queries, cover.keys, cover.keys)
        sequences = self._sequences(cover)
        inner: tuple[Tensor, ...]
        if sequences is not None:
            (q, dout, out, lse), (k, v) = inner_rows, inner_keys
            inner = flash_varlen.backward(
                q, k, v, dout, out, lse, sequences, softmax_scale=softmax_scale
            )
            del q, k, v, dout, out, lse
        else:
            inner = tuple(
                total if order is None else total.new_zeros(of.shape)
                for total, order, of in zip(sums, orders, (inner_rows[0], *inner_keys), strict=True)
            )
            for each in cover.inner:
                self._add_one(each, inner_rows, inner_keys, inner, softmax_scale)
        for total, order, part in zip(sums, orders, inner, strict=True):
            if order is not None:
                order.put(total, part)
            elif part is not total:
                total.copy_(part)
        del inner, inner_keys, inner_rows
        for each in cover.whole:
            self._add_one(each, rows, keys, sums, softmax_scale)

    def _add_one(
        self,
        each: Rectangle,
        rows: tuple[Tensor, ...],
        keys: tuple[Tensor, ...],
        sums: tuple[Tensor, ...],
        softmax_scale: float,
    ) -> None:
        gradients = self._backward(each, rows, keys, softmax_scale)
        dq, dk, dv = sums
        for total, sole, gradient in zip(
            (_queries_of(each, dq), _keys_of(each, dk), _keys_of(each, dv)),
            (each.sole_queries, each.sole_keys, each.sole_keys),
            gradients,
            strict=True,
        ):
            if sole:
                total.copy_(gradient)
            else:
                total.add_(gradient)

    def _backward(
        self,
        each: Rectangle,
        rows: tuple[Tensor, ...],
        keys: tuple[Tensor, ...],
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, dout, out, lse = (_queries_of(each, t) for t in rows)
        k, v = (_keys_of(each, t) for t in keys)
        lse = lse.transpose(1, 2)
        return self._gradients(
            q, k, v, dout, out, lse, causal=each.causal, softmax_scale=softmax_scale
        )


def _taken(order: Order | None, tensor: Tensor) -> Tensor:
    return tensor if order is None else order.take(tensor)


def _queries_of(each: Rectangle, tensor: Tensor) -> Tensor:
    """Its part of a tensor ``[B, S, ...]``, as a view."""
    return tensor[each.batch, each.queries]


def _keys_of(each: Rectangle, tensor: Tensor) -> Tensor:
    """Its part of a tensor ``[B, T, ...]``, as a view."""
    return tensor[each.batch, each.keys]
