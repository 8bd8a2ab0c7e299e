"""PyTorch's cuDNN attention, as a candidate of ``auto``; what it cannot do, ``native`` does."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_lvx.kernels import flash
from ds_lvx.kernels.interface import written
from ds_lvx.kernels.merge import merge_
from ds_lvx.kernels.native import NativeKernel
from ds_lvx.kernels.visibility import Visibility

_aten = torch.ops.aten
MAX_HEAD_DIM = 128


def can(q: Tensor) -> bool:
    """Whether cuDNN's kernel does queries like ``q``: 16 bits, head_dim 8, 16, ... 128."""
    return flash.cuda_can(q, None) and q.shape[-1] <= MAX_HEAD_DIM and torch.backends.cudnn.enabled


class CudnnKernel(NativeKernel):
    """cuDNN's fused kernels where there is no visibility and no gradient of lse. Stateless."""

    name = "cudnn"

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        visibility: Visibility | None,
        softmax_scale: float,
        partial: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See `ds_lvx.kernels.Kernel.forward`."""
        if visibility is None and q.numel() and k.numel():
            return forward(q, k, v, softmax_scale=softmax_scale)
        return super().forward(
            q, k, v, visibility=visibility, softmax_scale=softmax_scale, partial=partial
        )

    def fold(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        running: tuple[Tensor, Tensor],
        *,
        visibility: Visibility | None,
        softmax_scale: float,
    ) -> None:
        """See `ds_lvx.kernels.Kernel.fold`."""
        part = self.forward(
            q, k, v, visibility=visibility, softmax_scale=softmax_scale, partial=True
        )
        merge_(*running, *part)

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dout: Tensor,
        lse: Tensor,
        delta: Tensor,
        *,
        visibility: Visibility | None,
        softmax_scale: float,
        has_dlse: bool,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ds_lvx.kernels.Kernel.backward`."""
        if visibility is None and not has_dlse and q.numel() and k.numel():
            dq, *gradients = backward(q, k, v, dout, lse, delta, softmax_scale=softmax_scale)
            return dq, *written((gradients[0], gradients[1]), into)
        return super().backward(
            q,
            k,
            v,
            dout,
            lse,
            delta,
            visibility=visibility,
            softmax_scale=softmax_scale,
            has_dlse=has_dlse,
            into=into,
        )


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
