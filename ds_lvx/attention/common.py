"""What every method shares: delta, and the attention of a group of one rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_lvx.attention.call import Call
from ds_lvx.attention.replay import once
from ds_lvx.kernels.interface import Upstream


def delta_of(out: Tensor, dout: Tensor | None, dlse: Tensor | None, lse: Tensor) -> Tensor:
    """``rowsum(dout * out) - dlse``, ``[batch, num_heads, seqlen_q]`` in lse's dtype.

    A row that saw nothing gets 0: nothing flows back through it, whatever arrives.
    """
    if dout is None:
        delta = torch.zeros_like(lse)
    else:  # in lse's dtype, which is never narrower
        delta = (dout.to(lse.dtype) * out).sum(dim=-1).transpose(1, 2)
    if dlse is not None:
        delta = delta - dlse
    return delta.masked_fill(lse == -torch.inf, 0.0)


class LocalAttention(torch.autograd.Function):
    """Attention of this rank's queries over this rank's keys: no communication."""

    @staticmethod
    def forward(ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Run the kernel; ``(out, lse)``, both differentiable."""
        rule = call.layout.rule(queries=0, keys=0)

        def compute() -> tuple[Tensor, Tensor]:
            out, lse = call.kernel.forward(call.problem(q, k, v, rule))
            return out.to(q.dtype), lse

        out, lse = once("local attention", compute)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call, ctx.rule = call, rule
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        """Gradients of q, k and v."""
        q, k, v, out, lse = ctx.saved_tensors
        upstream = Upstream(
            torch.zeros_like(out) if dout is None else dout,
            lse,
            delta_of(out, dout, dlse, lse),
            has_dlse=dlse is not None,
        )
        problem = ctx.call.problem(q, k, v, ctx.rule)
        dq, dk, dv = ctx.call.kernel.backward(problem, upstream)
        return None, dq.to(q.dtype), dk, dv
