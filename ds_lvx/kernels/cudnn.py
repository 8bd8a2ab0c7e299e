"""PyTorch's cuDNN attention, as a candidate of ``auto``; what it cannot do, ``native`` does."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_lvx.kernels import flash
from ds_lvx.kernels.interface import Kernel, Problem, Upstream, written
from ds_lvx.kernels.native import NativeKernel

_aten = torch.ops.aten
MAX_HEAD_DIM = 128


def obstacle(q: Tensor) -> str | None:
    """Why cuDNN's kernel cannot do queries like ``q``; None where it can."""
    if flash.cuda_can(q) and q.shape[-1] <= MAX_HEAD_DIM and torch.backends.cudnn.enabled:
        return None
    return f"{q.dtype} with head_dim {q.shape[-1]}, where it does 16 bits and 8, 16, ... 128"


class CudnnKernel(NativeKernel):
    """cuDNN's fused kernels where there is no rule and no gradient of lse. Stateless."""

    name = "cudnn"

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """See `ds_lvx.kernels.interface.Kernel.forward`."""
        if problem.rule is not None or problem.is_empty:
            return super().forward(problem)
        return forward(problem.q, problem.k, problem.v, softmax_scale=problem.softmax_scale)

    def fold(self, problem: Problem, running: tuple[Tensor, Tensor]) -> None:
        """See `ds_lvx.kernels.interface.Kernel.fold`."""
        Kernel.fold(self, problem, running)

    def backward(
        self,
        problem: Problem,
        upstream: Upstream,
        *,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ds_lvx.kernels.interface.Kernel.backward`."""
        if problem.rule is not None or upstream.has_dlse or problem.is_empty:
            return super().backward(problem, upstream, into=into)
        dq, dk, dv = backward(
            problem.q,
            problem.k,
            problem.v,
            upstream.dout,
            upstream.lse,
            upstream.delta,
            softmax_scale=problem.softmax_scale,
        )
        return dq, *written((dk, dv), into)


def forward(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Attention over all keys, no mask: ``out [B, S, H, D]`` and ``lse [B, H, S]`` in fp32."""
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
        *(flash.heads_first(t) for t in (q, k, v)), None, True, scale=softmax_scale
    )
    return out.transpose(1, 2), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    *,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients given the softmax over all keys; see `ds_lvx.kernels.flash.cuda_backward`."""
    dout = dout.to(q.dtype)
    # Without dropout nobody reads the generator's state.
    nothing = torch.zeros((), dtype=torch.int64, device=q.device)
    gradients = _aten._scaled_dot_product_cudnn_attention_backward(
        flash.heads_first(dout),
        *(flash.heads_first(t) for t in (q, k, v)),
        flash.heads_first(flash.stand_in(dout, delta)),
        lse.unsqueeze(-1).contiguous(),
        nothing,
        nothing,
        None,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        False,
        scale=softmax_scale,
    )
    dq, dk, dv = (gradient.transpose(1, 2) for gradient in gradients)
    return dq, dk, dv
