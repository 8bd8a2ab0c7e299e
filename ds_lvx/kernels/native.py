"""The ``native`` kernel: PyTorch's own fused attention, on CPU and CUDA, forward and backward.

Without visibility it is one call. With it, keys are cut into blocks, and no mask is larger than a
block; on a CPU a block that no query sees is left out, and one that all see, or that is a causal
square, needs no mask. Where no fused kernel does a block (`ds_lvx.kernels.flash`), matrix products
in fp32 do (`ds_lvx.kernels.dense`); so they do on a CPU whose oneDNN makes them faster than
PyTorch's kernel in 16 bits or 32 (`ds_lvx.kernels.onednn`), unless queries are very few.

PyTorch's kernels round their output to q's dtype. A part that is still to be merged would be
rounded twice, so on a CPU, where it costs next to nothing, 16-bit parts are computed block by
block in fp32. So are 16-bit gradients where it is faster: of few queries, because what makes 16
bits fast there are large matrix products; and of any on a processor without AVX-512, where
PyTorch's products in 16 bits take ten times as long as those in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from typing import TypedDict

import torch
from torch import Tensor

from ds_lvx.kernels import dense, flash, onednn, whole
from ds_lvx.kernels.choice import made_for_speed
from ds_lvx.kernels.interface import Kernel, Problem, Upstream, no_gradients, written
from ds_lvx.kernels.merge import accumulation_dtype, empty_part, merge_
from ds_lvx.kernels.rule import Block, whole_blocks
from ds_lvx.kernels.warn import warn_once

# Large enough that a block's kernel dwarfs its launch, small enough for its mask to be cheap.
_MASK_ELEMENTS = 2**24
_SCORE_ELEMENTS = 2**25
_MIN_KEYS, _MAX_KEYS = 256, 4096
# On a CPU what a block reads and writes stays in the cache from one product to the next.
_CPU_BLOCK_BYTES = 2**22  # of K and V in fp32
_CPU_SCORE_ELEMENTS = 2**21
_CPU_SQUARE = 256  # a causal one takes PyTorch's kernel as long as a whole one
_CPU_MIN_KEYS = 512  # of products: with fewer, merging their results takes longer
_FEW_QUERIES = 128
_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
_FEWEST_ROWS = 16  # for products: queries times the query heads of a key/value head


class _Seen(TypedDict):
    """What `_forward` and `_backward` want to know of a block."""

    mask: Tensor | None
    causal: bool
    fused: bool


class NativeKernel(Kernel):
    """PyTorch's fused kernels; see the module. Stateless."""

    name = "native"

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """See `ds_lvx.kernels.interface.Kernel.forward`."""
        dtype = accumulation_dtype(problem.q.dtype)
        if problem.is_empty:  # the fused kernels end the process on these
            return empty_part(problem.q, dtype)
        if _in_one_call(problem):
            return _forward(problem)
        running = empty_part(problem.q, dtype)
        _fold_blocks(problem, running)
        return running

    def fold(self, problem: Problem, running: tuple[Tensor, Tensor]) -> None:
        """See `ds_lvx.kernels.interface.Kernel.fold`."""
        if not problem.is_empty:
            _fold_blocks(problem.as_part(), running)

    def backward(
        self,
        problem: Problem,
        upstream: Upstream,
        *,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ds_lvx.kernels.interface.Kernel.backward`."""
        q = problem.q
        if problem.is_empty:
            return no_gradients(problem, into, q.dtype)
        fused = not upstream.has_dlse and _fused(problem)
        slow = q.device.type == "cpu" and (q.shape[1] <= _FEW_QUERIES or not _AVX512)
        if problem.rule is None and fused and not (slow and _is_narrow(q)):
            out = flash.stand_in(upstream.dout.to(q.dtype), upstream.delta)
            dq, dk, dv = _backward(problem, upstream, out)
            return dq, *written((dk, dv), into)
        wide = accumulation_dtype(q.dtype) if fused and slow else q.dtype
        return _backward_blocks(problem, upstream, fused=fused, wide=wide, into=into)


def _backward_blocks(
    problem: Problem,
    upstream: Upstream,
    *,
    fused: bool,
    wide: torch.dtype,
    into: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients block by block; what a block's kernel gets is made ``wide`` first.

    Blocks of queries over the same keys follow each other: their parts of dk and dv add up before
    they are rounded, and only for these keys.
    """
    q, k, v, dout = problem.q, problem.k, problem.v, upstream.dout
    lse, delta = upstream.lse, upstream.delta
    dq = torch.zeros(q.shape, dtype=accumulation_dtype(q.dtype), device=q.device)
    dk, dv = into or (torch.empty_like(k), torch.empty_like(v))
    if problem.rule is not None:  # keys that nobody sees have no block
        dk.zero_()
        dv.zero_()
    blocks = _blocks(problem, fused=fused)
    seeing = _seeing(blocks)
    q, dout = q[:, seeing].to(wide), dout[:, seeing].to(wide)
    lse, delta = lse[:, :, seeing], delta[:, :, seeing]
    out = flash.stand_in(dout, delta) if fused else None
    for keys, blocks_of_queries in groupby(blocks, key=attrgetter("keys")):
        block_k, block_v = k[:, keys].to(wide), v[:, keys].to(wide)
        sums: list[Tensor] = []
        for block in blocks_of_queries:
            rows = _within(seeing, block.queries)
            part_dq, *parts = _backward(
                Problem(q[:, rows], block_k, block_v, softmax_scale=problem.softmax_scale),
                Upstream(dout[:, rows], lse[:, :, rows], delta[:, :, rows]),
                None if out is None else out[:, rows],
                **_seen(problem, block, fused=fused),
            )
            dq[:, block.queries] += part_dq
            sums = [one + other for one, other in zip(sums, parts, strict=True)] if sums else parts
        dk[:, keys], dv[:, keys] = sums
    return dq, dk, dv


def _fold_blocks(problem: Problem, running: tuple[Tensor, Tensor]) -> None:
    """Merge attention over these keys into a running result, block by block."""
    q, k, v = problem.q, problem.k, problem.v
    out, lse = running
    if _in_one_call(problem):
        merge_(out, lse, *_forward(problem))
        return
    fused = _fused(problem)
    wide = accumulation_dtype(q.dtype) if fused and q.device.type == "cpu" else q.dtype
    blocks = _blocks(problem, fused=fused)
    seeing = _seeing(blocks)
    q = q[:, seeing].to(wide)
    for block in blocks:
        rows, keys = block.queries, block.keys
        tensors = q[:, _within(seeing, rows)], k[:, keys].to(wide), v[:, keys].to(wide)
        piece = Problem(*tensors, softmax_scale=problem.softmax_scale)
        part = _forward(piece, **_seen(problem, block, fused=fused))
        merge_(out[:, rows], lse[:, :, rows], *part)


def _seeing(blocks: Sequence[Block]) -> slice:
    """From the first to the last query of any block: of zigzag pieces half of the queries see
    nothing of the keys of an earlier rank."""
    queries = [block.queries for block in blocks] or [slice(0, 0)]
    return slice(min(each.start for each in queries), max(each.stop for each in queries))


def _within(seeing: slice, rows: slice) -> slice:
    return slice(rows.start - seeing.start, rows.stop - seeing.start)


def _seen(problem: Problem, block: Block, *, fused: bool) -> _Seen:
    """How `_forward` and `_backward` are to compute a block."""
    causal = fused and block.causal
    mask = None if causal or problem.rule is None else problem.rule.mask(block)
    return {"mask": mask, "causal": causal, "fused": fused}


def _in_one_call(problem: Problem) -> bool:
    q = problem.q
    widened = problem.partial and q.device.type == "cpu" and _is_narrow(q)
    return problem.rule is None and _fused(problem) and not widened


def _is_narrow(q: Tensor) -> bool:
    return q.dtype != accumulation_dtype(q.dtype)


def _fused(problem: Problem) -> bool:
    """Whether PyTorch's fused kernels are to be taken, rather than matrix products."""
    q, k = problem.q, problem.k
    if q.device.type == "cpu":
        rows = q.shape[1] * q.shape[2] // k.shape[2]
        return rows < _FEWEST_ROWS or q.dtype == torch.float64 or not onednn.serves()
    return q.device.type == "cuda" and problem.rule is None and flash.cuda_can(q)


def _blocks(problem: Problem, *, fused: bool) -> tuple[Block, ...]:
    """Blocks whose masks (or unfused scores) stay within a budget."""
    q, k = problem.q, problem.k
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
    keys = max(min(budget // rows, most), _MIN_KEYS)
    if problem.rule is None:
        return whole_blocks(seqlen_q, k.shape[1], rows, keys, masked=False)
    if fused and cpu:
        rows = min(seqlen_q, _CPU_SQUARE)
        keys = min(_CPU_SQUARE**2 // rows, most)
        return problem.rule.blocks(queries_per_block=rows, keys_per_block=keys, most_keys=most)
    if cpu and keys >= k.shape[1]:  # of a causal square a quarter is then left out
        rows, keys = (min(n, max(-(-n // 2), _MIN_KEYS)) for n in (rows, k.shape[1]))
    return problem.rule.blocks(queries_per_block=rows, keys_per_block=keys)


def _forward(
    problem: Problem, *, mask: Tensor | None = None, causal: bool = False, fused: bool = True
) -> tuple[Tensor, Tensor]:
    q, k, v, scale = problem.q, problem.k, problem.v, problem.softmax_scale
    if fused and q.device.type == "cpu":
        return flash.cpu_forward(q, k, v, mask=mask, causal=causal, softmax_scale=scale)
    if fused:
        return whole.forward(flash.forward, q, k, v, causal=False, softmax_scale=scale)
    warn_of_products(q)
    dtype = accumulation_dtype(q.dtype)
    with onednn.products():
        return dense.forward(q, k, v, mask=mask, softmax_scale=scale, dtype=dtype)


def _backward(
    problem: Problem,
    upstream: Upstream,
    out: Tensor | None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    fused: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``out`` is `flash.stand_in`'s where a fused kernel does it."""
    q, scale = problem.q, problem.softmax_scale
    k, v, dout, lse, delta = problem.k, problem.v, upstream.dout, upstream.lse, upstream.delta
    if fused and out is not None:
        dout = dout.to(q.dtype)
        if q.device.type == "cpu":
            return flash.cpu_backward(
                q, k, v, dout, out, lse, mask=mask, causal=causal, softmax_scale=scale
            )
        return whole.backward(
            flash.backward, (q, k, v), dout, out, lse, causal=False, softmax_scale=scale
        )
    warn_of_products(q)
    dtype = accumulation_dtype(q.dtype)
    with onednn.products():
        return dense.backward(
            q, k, v, dout, lse, delta, mask=mask, softmax_scale=scale, dtype=dtype
        )


def warn_of_products(q: Tensor) -> None:
    """Say once, of queries on CUDA, that fp32 matrix products do them, and what would serve."""
    if q.device.type == "cuda":
        _warn_of(q.dtype, q.shape[-1], q.device)


@functools.cache
def _warn_of(dtype: torch.dtype, head_dim: int, device: torch.device) -> None:
    q = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
    warn_once(
        f"attention of {dtype} with head_dim {head_dim} runs by plain matrix products (native), "
        "the slowest way on a GPU. Made for speed, and taken by kernel auto where they can: "
        f"{made_for_speed(q)}"
    )
