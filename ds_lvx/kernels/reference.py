"""The ``reference`` kernel: float64 over all keys of a rank at once. For checks, not for speed."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_lvx.kernels import dense
from ds_lvx.kernels.interface import Kernel, Problem, Upstream, no_gradients, written
from ds_lvx.kernels.merge import accumulation_dtype, empty_part


class ReferenceKernel(Kernel):
    """Dense attention in float64; memory is O(S_q x S_kv). Stateless."""

    name = "reference"

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """See `ds_lvx.kernels.interface.Kernel.forward`."""
        dtype = accumulation_dtype(problem.q.dtype)
        if problem.k.numel() == 0:
            return empty_part(problem.q, dtype)
        out, lse = dense.forward(
            problem.q,
            problem.k,
            problem.v,
            mask=_mask(problem),
            softmax_scale=problem.softmax_scale,
            dtype=torch.float64,
        )
        return out.to(dtype), lse.to(dtype)

    def backward(
        self,
        problem: Problem,
        upstream: Upstream,
        *,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ds_lvx.kernels.interface.Kernel.backward`."""
        q, k, v = problem.q, problem.k, problem.v
        dtype = accumulation_dtype(q.dtype)
        if k.numel() == 0:
            return no_gradients(problem, into, dtype)
        dq, dk, dv = dense.backward(
            q,
            k,
            v,
            upstream.dout,
            upstream.lse,
            upstream.delta,
            mask=_mask(problem),
            softmax_scale=problem.softmax_scale,
            dtype=torch.float64,
        )
        return dq.to(dtype), *written((dk.to(k.dtype), dv.to(v.dtype)), into)


def _mask(problem: Problem) -> Tensor | None:
    return None if problem.rule is None else problem.rule.visibility.mask()
