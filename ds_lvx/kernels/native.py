"""The ``native`` kernel: PyTorch's own fused attention, on CPU and CUDA, forward and backward.

Without visibility it is one call. With it, keys are cut into blocks, and no mask is larger than a
block; on a CPU a block that no query sees is left out, and one that all see needs no mask. Where no
fused kernel does a block (`ds_lvx.kernels.flash`), matrix products in fp32 do
(`ds_lvx.kernels.dense`); so they do on a CPU whose oneDNN makes them faster than PyTorch's kernel
in 16 bits or 32 (`ds_lvx.kernels.onednn`), unless queries are very few.

PyTorch's kernels round their output to q's dtype. A part that is still to be merged would be
rounded twice, so on a CPU, where it costs next to nothing, 16-bit parts are computed block by
block in fp32. So are 16-bit gradients of few queries, because it is faster: what makes 16 bits fast
there are large matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter

import torch
from torch import Tensor

from ds_lvx.kernels import dense, flash, onednn
from ds_lvx.kernels.interface import written
from ds_lvx.kernels.merge import accumulation_dtype, empty_part, merge_
from ds_lvx.kernels.visibility import Block, Visibility, blocks

# Large enough that a block's kernel dwarfs its launch, small enough for its mask to be cheap.
_MASK_ELEMENTS = 2**24
_SCORE_ELEMENTS = 2**25
_MIN_KEYS, _MAX_KEYS = 256, 4096
# On a CPU what a block reads and writes stays in the cache from one product to the next.
_CPU_BLOCK_BYTES = 2**22  # of K and V in fp32
_CPU_SCORE_ELEMENTS = 2**21
_CPU_MIN_KEYS = 512  # of products: with fewer, merging their results takes longer
_FEW_QUERIES = 128
_FEWEST_ROWS = 16  # for products: queries times the query heads of a key/value head


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
        if _in_one_call(q, k, visibility, partial=partial):
            return _forward(q, k, v, None, softmax_scale, fused=True)
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
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ds_lvx.kernels.Kernel.backward`."""
        if q.numel() == 0 or k.numel() == 0:
            return torch.zeros_like(q), *written((torch.zeros_like(k), torch.zeros_like(v)), into)
        fused = not has_dlse and _fused(q, k, visibility)
        few = q.device.type == "cpu" and q.shape[1] <= _FEW_QUERIES
        if visibility is None and fused and not (few and _is_narrow(q)):
            tensors = (q, k, v, dout, lse, delta)
            dq, dk, dv = _backward(*tensors, None, softmax_scale, fused=True)
            return dq, *written((dk, dv), into)
        return _backward_blocks(
            (q, k, v, dout, lse, delta),
            visibility,
            softmax_scale,
            fused=fused,
            wide=accumulation_dtype(q.dtype) if fused and few else q.dtype,
            into=into,
        )


def _backward_blocks(
    tensors: tuple[Tensor, ...],
    visibility: Visibility | None,
    softmax_scale: float,
    *,
    fused: bool,
    wide: torch.dtype,
    into: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients block by block; what a block's kernel gets is made ``wide`` first.

    Blocks of queries over the same keys follow each other: their parts of dk and dv add up before
    they are rounded, and only for these keys.
    """
    q, k, v, dout, lse, delta = tensors
    dq = torch.zeros(q.shape, dtype=accumulation_dtype(q.dtype), device=q.device)
    dk, dv = into or (torch.empty_like(k), torch.empty_like(v))
    if visibility is not None:  # keys that nobody sees have no block
        dk.zero_()
        dv.zero_()
    q, dout = q.to(wide), dout.to(wide)
    of_same_keys = groupby(_cut(q, k, fused=fused).blocks(visibility), key=attrgetter("keys"))
    for keys, blocks_of_queries in of_same_keys:
        block_k, block_v = k[:, keys].to(wide), v[:, keys].to(wide)
        sums: list[Tensor] = []
        for block in blocks_of_queries:
            rows = block.queries
            part_dq, *parts = _backward(
                q[:, rows],
                block_k,
                block_v,
                dout[:, rows],
                lse[:, :, rows],
                delta[:, :, rows],
                block.mask,
                softmax_scale,
                fused=fused,
            )
            dq[:, rows] += part_dq
            sums = [one + other for one, other in zip(sums, parts, strict=True)] if sums else parts
        dk[:, keys], dv[:, keys] = sums
    return dq, dk, dv


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
    if _in_one_call(q, k, visibility, partial=True):
        merge_(out, lse, *_forward(q, k, v, None, softmax_scale, fused=True))
        return
    fused = _fused(q, k, visibility)
    wide = accumulation_dtype(q.dtype) if fused and q.device.type == "cpu" else q.dtype
    q = q.to(wide)
    for block in _cut(q, k, fused=fused).blocks(visibility):
        rows, keys = block.queries, block.keys
        block_k, block_v = k[:, keys].to(wide), v[:, keys].to(wide)
        part = _forward(q[:, rows], block_k, block_v, block.mask, softmax_scale, fused=fused)
        merge_(out[:, rows], lse[:, :, rows], *part)


def _in_one_call(q: Tensor, k: Tensor, visibility: Visibility | None, *, partial: bool) -> bool:
    widened = partial and q.device.type == "cpu" and _is_narrow(q)
    return visibility is None and _fused(q, k, None) and not widened


def _is_narrow(q: Tensor) -> bool:
    return q.dtype != accumulation_dtype(q.dtype)


def _fused(q: Tensor, k: Tensor, visibility: Visibility | None) -> bool:
    """Whether PyTorch's fused kernels are to be taken, rather than matrix products."""
    if q.device.type == "cpu":
        rows = q.shape[1] * q.shape[2] // k.shape[2]
        return rows < _FEWEST_ROWS or q.dtype == torch.float64 or not onednn.serves()
    mask = None if visibility is None else visibility.kv_pos
    return q.device.type == "cuda" and flash.cuda_can(q, mask)


@dataclass(frozen=True)
class _Cut:
    """How queries and keys are cut into blocks."""

    seqlen_q: int
    seqlen_kv: int
    queries_per_block: int
    keys_per_block: int

    def blocks(self, visibility: Visibility | None) -> Iterator[Block]:
        return blocks(visibility, **asdict(self))


def _cut(q: Tensor, k: Tensor, *, fused: bool) -> _Cut:
    """Blocks whose masks (or unfused scores) stay within a budget."""
    batch, seqlen_q, heads, _ = q.shape
    cpu = q.device.type == "cpu"
    scores = _CPU_SCORE_ELEMENTS if cpu else _SCORE_ELEMENTS
    budget = _MASK_ELEMENTS // batch if fused else scores // (batch * heads)
    fewest, most = _MIN_KEYS, _MAX_KEYS
    if cpu:
        key_bytes = 2 * batch * k.shape[2] * k.shape[3] * accumulation_dtype(k.dtype).itemsize
        most = max(min(most, _CPU_BLOCK_BYTES // key_bytes), _MIN_KEYS)
        fewest = min(_CPU_MIN_KEYS, most)
    rows = seqlen_q if fused else min(seqlen_q, max(budget // fewest, 1))
    return _Cut(seqlen_q, k.shape[1], rows, max(min(budget // rows, most), _MIN_KEYS))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softmax_scale: float, *, fused: bool
) -> tuple[Tensor, Tensor]:
    if fused and q.device.type == "cpu":
        return flash.cpu_forward(q, k, v, mask=mask, softmax_scale=softmax_scale)
    if fused:
        return flash.cuda_forward(q, k, v, softmax_scale=softmax_scale)
    dtype = accumulation_dtype(q.dtype)
    with onednn.products():
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
    with onednn.products():
        return dense.backward(*tensors, mask=mask, softmax_scale=softmax_scale, dtype=dtype)
