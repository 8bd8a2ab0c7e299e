"""The ``native`` kernel: PyTorch's own fused attention, on CPU and CUDA, forward and backward.

Without visibility it is one call. With it, keys are cut into blocks, and no mask is larger than a
block; on a CPU a block that no query sees is left out, and one that all see needs no mask. Where no
fused kernel does a block (`ds_lvx.kernels.flash`), matrix products do (`ds_lvx.kernels.dense`).

PyTorch's kernels round their output to q's dtype. A part that is still to be merged would be
rounded twice, so on a CPU, where it costs next to nothing, 16-bit parts are computed block by
block in fp32. So are 16-bit gradients of few queries, because it is faster: what makes 16 bits fast
there are large matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ds_lvx.kernels import dense, flash
from ds_lvx.kernels.merge import accumulation_dtype, empty_part, merge_
from ds_lvx.visibility import Block, Visibility, blocks

# Large enough that a block's kernel dwarfs its launch, small enough for its mask to be cheap.
_MASK_ELEMENTS = 2**24
_SCORE_ELEMENTS = 2**25
_MIN_KEYS, _MAX_KEYS = 256, 4096
_CPU_BLOCK_BYTES = 2**22  # of K and V in fp32: they stay in the cache from one product to the next
_FEW_QUERIES = 128


class NativeKernel:
    """PyTorch's fused kernels; see the module. Stateless."""

    name = "native"

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
        dtype = accumulation_dtype(q.dtype)
        if q.numel() == 0 or k.numel() == 0:  # the fused kernels end the process on these
            return empty_part(q, dtype)
        if _in_one_call(q, visibility, partial=partial):
            return _forward(q, k, v, None, softmax_scale)
        running = empty_part(q, dtype)
        _fold_blocks(q, k, v, running, visibility=visibility, softmax_scale=softmax_scale)
        return running

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
        if q.numel() and k.numel():
            _fold_blocks(q, k, v, running, visibility=visibility, softmax_scale=softmax_scale)

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ds_lvx.kernels.Kernel.backward`."""
        if q.numel() == 0 or k.numel() == 0:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        fused = not has_dlse and _fused(q, visibility)
        few = q.device.type == "cpu" and q.shape[1] <= _FEW_QUERIES
        if visibility is None and fused and not (few and _is_narrow(q)):
            return _backward(q, k, v, dout, lse, delta, None, softmax_scale, fused=True)
        dtype = accumulation_dtype(q.dtype)
        dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
        # Without a fused kernel, a key may get its gradient from several blocks of queries.
        key_dtype = k.dtype if fused else dtype
        dk, dv = torch.zeros_like(k, dtype=key_dtype), torch.zeros_like(v, dtype=key_dtype)
        wide = dtype if few else q.dtype
        q, dout = q.to(wide), dout.to(wide)
        for block in _blocks(q, k, visibility, fused=fused):
            rows, keys = block.queries, block.keys
            part_dq, part_dk, part_dv = _backward(
                q[:, rows],
                k[:, keys].to(wide),
                v[:, keys].to(wide),
                dout[:, rows],
                lse[:, :, rows],
                delta[:, :, rows],
                block.mask,
                softmax_scale,
                fused=fused,
            )
            dq[:, rows] += part_dq
            dk[:, keys] += part_dk
            dv[:, keys] += part_dv
        return dq, dk.to(k.dtype), dv.to(v.dtype)


def _fold_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    running: tuple[Tensor, Tensor],
    *,
    visibility: Visibility | None,
    softmax_scale: float,
) -> None:
    """Merge attention over these keys into a running result, block by block."""
    out, lse = running
    if _in_one_call(q, visibility, partial=True):
        merge_(out, lse, *_forward(q, k, v, None, softmax_scale))
        return
    cpu, dtype = q.device.type == "cpu", accumulation_dtype(q.dtype)
    if cpu:
        q = q.to(dtype)
    for block in _blocks(q, k, visibility, fused=_fused(q, visibility)):
        rows, keys = block.queries, block.keys
        block_k, block_v = (t[:, keys].to(dtype) if cpu else t[:, keys] for t in (k, v))
        part = _forward(q[:, rows], block_k, block_v, block.mask, softmax_scale)
        merge_(out[:, rows], lse[:, :, rows], *part)


def _in_one_call(q: Tensor, visibility: Visibility | None, *, partial: bool) -> bool:
    widened = partial and q.device.type == "cpu" and _is_narrow(q)
    return visibility is None and _fused(q, None) and not widened


def _is_narrow(q: Tensor) -> bool:
    return q.dtype != accumulation_dtype(q.dtype)


def _fused(q: Tensor, visibility: Visibility | None) -> bool:
    if q.device.type == "cpu":
        return True
    mask = None if visibility is None else visibility.kv_pos
    return q.device.type == "cuda" and flash.cuda_can(q, mask)


def _blocks(q: Tensor, k: Tensor, visibility: Visibility | None, *, fused: bool) -> Iterator[Block]:
    """Blocks, one at a time, whose masks (or unfused scores) stay within a budget."""
    batch, seqlen_q, heads, _ = q.shape
    budget = _MASK_ELEMENTS // batch if fused else _SCORE_ELEMENTS // (batch * heads)
    rows = seqlen_q if fused else min(seqlen_q, max(budget // _MIN_KEYS, 1))
    most = _MAX_KEYS
    if q.device.type == "cpu":
        key_bytes = 2 * batch * k.shape[2] * k.shape[3] * accumulation_dtype(k.dtype).itemsize
        most = min(most, _CPU_BLOCK_BYTES // key_bytes)
    return blocks(
        visibility,
        seqlen_q=seqlen_q,
        seqlen_kv=k.shape[1],
        queries_per_block=rows,
        keys_per_block=max(min(budget // rows, most), _MIN_KEYS),
    )


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return flash.cpu_forward(q, k, v, mask=mask, softmax_scale=softmax_scale)
    if q.device.type == "cuda" and flash.cuda_can(q, mask):
        return flash.cuda_forward(q, k, v, softmax_scale=softmax_scale)
    dtype = accumulation_dtype(q.dtype)
    return dense.forward(q, k, v, mask=mask, softmax_scale=softmax_scale, dtype=dtype)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: Tensor | None,
    softmax_scale: float,
    *,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (q, k, v, dout, lse, delta)
    if fused and q.device.type == "cpu":
        return flash.cpu_backward(*tensors, mask=mask, softmax_scale=softmax_scale)
    if fused:
        return flash.cuda_backward(*tensors, softmax_scale=softmax_scale)
    dtype = accumulation_dtype(q.dtype)
    return dense.backward(*tensors, mask=mask, softmax_scale=softmax_scale, dtype=dtype)
