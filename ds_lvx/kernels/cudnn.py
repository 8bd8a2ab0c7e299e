"""PyTorch's cuDNN attention, slice by slice like ``flash``: what ``auto`` takes from Hopper on."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_lvx.kernels import flash
from ds_lvx.kernels.flash_kernel import FlashKernel

_aten = torch.ops.aten
MAX_HEAD_DIM = 128


def obstacle(q: Tensor) -> str | None:
    """Why cuDNN's kernel cannot do queries like ``q``; None where it can."""
    if q.device.type != "cuda":
        return f"tensors on {q.device.type}, where it needs an NVIDIA GPU"
    if flash.cuda_can(q) and q.shape[-1] <= MAX_HEAD_DIM and torch.backends.cudnn.enabled:
        return None
    return f"{q.dtype} with head_dim {q.shape[-1]}, where it does 16 bits and 8, 16, ... 128"


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """See `ds_lvx.kernels.flash.forward`."""
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
        *(flash.heads_first(t) for t in (q, k, v)), None, True, 0.0, causal, scale=softmax_scale
    )
    return out.transpose(1, 2), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ds_lvx.kernels.flash.backward`."""
    # Without dropout nobody reads the generator's state.
    nothing = torch.zeros((), dtype=torch.int64, device=q.device)
    gradients = _aten._scaled_dot_product_cudnn_attention_backward(
        *(flash.heads_first(t) for t in (dout, q, k, v, out)),
        lse.unsqueeze(-1),
        nothing,
        nothing,
        None,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        causal,
        scale=softmax_scale,
    )
    dq, dk, dv = (gradient.transpose(1, 2) for gradient in gradients)
    return dq, dk, dv


class CudnnKernel(FlashKernel):
    """`FlashKernel` by cuDNN's calls. Stateless."""

    name = "cudnn"
    _has_sequences = False

    _call = staticmethod(forward)
    _call_backward = staticmethod(backward)
