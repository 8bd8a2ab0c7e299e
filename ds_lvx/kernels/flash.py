"""PyTorch's fused attention kernels with what autograd hides: lse out, a given lse back in.

Both take ``[batch, seqlen, num_heads, head_dim]`` here; the transposes to PyTorch's own layout are
views. The backward kernels want ``out`` only to form ``rowsum(dout * out)``; what travels between
ranks is ``delta``, so they get an ``out`` that has just this row sum (`stand_in`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import attention

from ds_lvx.kernels.device import AMPERE, capability
from ds_lvx.kernels.late_triton import launches_triton, triton_parts

_aten = torch.ops.aten

CUDA_DTYPES = (torch.bfloat16, torch.float16)
CUDA_HEAD_DIM_MULTIPLE = 8
CUDA_MAX_HEAD_DIM = 256
# At a time, for each of three or four temporaries: 16 MiB in fp32, or what stays in a CPU's cache,
# of memory that malloc keeps: faulting larger ones in again takes it ten times as long.
_STAND_IN_NUMBERS, _CPU_STAND_IN_NUMBERS = 2**22, 2**16


def version_in_place() -> str | None:
    """Which FlashAttention has taken PyTorch's operators (`ds_lvx.kernels.flash_version`); None:
    its own has them."""
    current = getattr(attention, "current_flash_attention_impl", None)  # not in an older PyTorch
    name: str | None = None if current is None else current()
    return name


def cuda_can(q: Tensor) -> bool:
    """Whether PyTorch's CUDA flash kernel does queries like ``q``, where all see all.

    It wants 16 bits, a head_dim that is a multiple of 8 up to 256, and Ampere or newer.
    """
    head_dim = q.shape[-1]
    able = not q.is_cuda or capability(q) >= AMPERE
    return (
        able
        and q.dtype in CUDA_DTYPES
        and head_dim <= CUDA_MAX_HEAD_DIM
        and head_dim % CUDA_HEAD_DIM_MULTIPLE == 0
    )


def cpu_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    softmax_scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention over one block of keys on a CPU; see `ds_lvx.kernels.dense.forward`.

    Args:
        q, k, v, mask, softmax_scale: as there.
        causal: query i sees keys 0 to i; as many keys as queries, and no mask.

    Returns:
        ``out [B, S, H, D]`` in q's dtype and ``lse [B, H, S]`` in fp32 (fp64 for fp64).
    """
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        heads_first(q),
        heads_first(k),
        heads_first(v),
        0.0,
        causal,
        attn_mask=_bias(mask, q.dtype),
        scale=softmax_scale,
    )
    if mask is not None:
        # The kernel reports lse = 0 for a row that sees nothing, as if it had seen one key.
        lse = lse.masked_fill(~mask.any(dim=-1)[:, None], -torch.inf)
    return out.transpose(1, 2), lse


def cpu_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    mask: Tensor | None,
    softmax_scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `cpu_forward`, given the softmax over all keys of all ranks; in q's dtype.

    Args:
        q, k, v, mask, softmax_scale, causal: as there.
        dout, out: like q, and its dtype; ``out`` may be `stand_in`'s.
        lse: ``[B, H, S]``.
    """
    gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        heads_first(dout),
        heads_first(q),
        heads_first(k),
        heads_first(v),
        heads_first(out),
        lse.masked_fill(lse == -torch.inf, 0.0),
        0.0,
        causal,
        attn_mask=_bias(mask, q.dtype),
        scale=softmax_scale,
    )
    dq, dk, dv = (gradient.transpose(1, 2) for gradient in gradients)
    return dq, dk, dv


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over all keys, or causal, with the flash kernel of q's device.

    Args:
        q: ``[B, S, H, D]``; no length is 0.
        k, v: ``[B, T, K, D]``.
        causal: query i sees keys 0 to i; as many keys as queries.
        softmax_scale: factor on the scores.

    Returns:
        ``out [B, S, H, D]`` in q's dtype and ``lse [B, H, S]`` in fp32 (fp64 for fp64).
    """
    tensors = [heads_first(t) for t in (q, k, v)]
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            *tensors, 0.0, causal, attn_mask=None, scale=softmax_scale
        )
    else:
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(
            *tensors, 0.0, causal, False, scale=softmax_scale
        )
    return out.transpose(1, 2), lse[..., : q.shape[1]]


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
    """Gradients of `forward`, given the softmax over all keys of all ranks; in q's dtype.

    Args:
        q, k, v, causal, softmax_scale: as in `forward`.
        dout, out: like q, and its dtype; ``out`` may be `stand_in`'s.
        lse: ``[B, H, S]``, finite and contiguous.
    """
    tensors = [heads_first(t) for t in (dout, q, k, v, out)]
    if q.device.type == "cpu":
        gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, lse, 0.0, causal, attn_mask=None, scale=softmax_scale
        )
    else:
        seed, offset = no_dropout(q.device)
        lengths = (None, None, q.shape[1], k.shape[1])
        gradients = _aten._scaled_dot_product_flash_attention_backward(
            *tensors, lse, *lengths, 0.0, causal, seed, offset, scale=softmax_scale
        )
    dq, dk, dv = (gradient.transpose(1, 2) for gradient in gradients)
    return dq, dk, dv


def no_dropout(device: torch.device) -> tuple[Tensor, Tensor]:
    """The state of a generator, which is not read without dropout; its shape and dtype are."""
    return (
        torch.zeros(2, dtype=torch.uint64, device=device),
        torch.zeros((), dtype=torch.uint64, device=device),
    )


def heads_first(tensor: Tensor) -> Tensor:
    """``[B, S, H, D]`` as ``[B, H, S, D]``: a view, unless a head's numbers lie apart.

    The kernels read a row of D numbers in one go, and do not check that it is one.
    """
    dense = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return dense.transpose(1, 2)


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Bool ``[batch, queries, keys]`` to the additive ``[batch, 1, queries, keys]`` of PyTorch."""
    if mask is None:
        return None
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~mask, -torch.inf).unsqueeze(1)


def stand_in(dout: Tensor, delta: Tensor) -> Tensor:
    """An ``out`` whose row sum with ``dout`` is ``delta``: ``dout * delta / rowsum(dout^2)``.

    Right as long as delta holds no gradient of lse: then dout = 0 implies delta = 0, and
    ``|delta| / |dout| <= |out|`` fits in any dtype. Rows are scaled by their largest element first,
    so that the square of a tiny dout does not underflow. One launch where Triton is; elsewhere what
    this takes in fp32 exists for a range of queries at a time.
    """
    if launches_triton(dout) and dout.dtype in CUDA_DTYPES:
        made: Tensor = triton_parts().stand_in(dout, delta)
        return made
    most = _CPU_STAND_IN_NUMBERS if dout.device.type == "cpu" else _STAND_IN_NUMBERS
    step = max(most // max(dout[:, :1].numel(), 1), 1)
    if step >= dout.shape[1]:
        return _stand_in(dout, delta)
    out = torch.empty(dout.shape, dtype=dout.dtype, device=dout.device)
    for start in range(0, dout.shape[1], step):
        rows = slice(start, start + step)
        out[:, rows] = _stand_in(dout[:, rows], delta[:, :, rows])
    return out


def _stand_in(dout: Tensor, delta: Tensor) -> Tensor:
    wide = dout.to(delta.dtype)
    largest = wide.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(delta.dtype).tiny)
    unit = wide / largest
    squares = (unit * unit).sum(dim=-1, keepdim=True).clamp_min(1.0)  # at least 1 unless dout is 0
    length = delta.transpose(1, 2).unsqueeze(-1) / largest / squares
    return (unit * length).to(dout.dtype)
