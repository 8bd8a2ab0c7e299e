"""The ``triton`` kernel: attention of few queries over very many keys; see the two kernel files."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ds_lvx.kernels import triton_backward, triton_forward
from ds_lvx.kernels.device import AMPERE, capability, processors, shared_bytes
from ds_lvx.kernels.interface import Kernel, Problem, Upstream, no_gradients, written
from ds_lvx.kernels.merge import empty_part
from ds_lvx.kernels.triton_tiles import (
    WIDE,
    WIDEST_BYTES,
    Tiles,
    atomic_tiles,
    count,
    forward_tiles,
    keys_tiles,
    padded,
    queries_tiles,
    shape_options,
    splits,
)

_ROWS_OF_A_MERGE = 32
_ATOMIC_FP32 = 128  # head_dim beyond which exact fp32 has no registers for five products in one


def obstacle(q: Tensor) -> str | None:
    """Why these kernels cannot run on q's device; None when they can."""
    if isinstance(triton_forward.forward_kernel, InterpretedFunction):
        return None
    if q.device.type != "cuda":
        return (
            f"tensors on {q.device.type}, where it needs an NVIDIA GPU (or TRITON_INTERPRET=1 in "
            "the environment, to try it slowly on a CPU)"
        )
    if capability(q) < AMPERE:
        return "a GPU before Ampere (compute capability 8.0)"
    if q.shape[-1] > WIDE and shared_bytes(q) < WIDEST_BYTES:
        return (
            f"head_dim {q.shape[-1]} on a GPU whose blocks have {shared_bytes(q) // 1024} KiB of "
            f"shared memory, where above {WIDE} it needs {WIDEST_BYTES // 1024}"
        )
    return None


class TritonKernel(Kernel):
    """Forward and backward in Triton. Stateless; K and V are read in place, at any strides."""

    name = "triton"
    _atomic = False

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """See `ds_lvx.kernels.interface.Kernel.forward`."""
        q = problem.q
        if problem.is_empty:
            return empty_part(q, torch.float32)
        parts, lses = _parts(problem)
        dtype = torch.float32 if problem.partial else q.dtype
        if parts.shape[0] == 1:
            return parts[0].to(dtype), lses[0]
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
        lse = torch.empty_like(lses[0])
        _merge(parts, lses, out, lse, fold=False)
        return out, lse

    def fold(self, problem: Problem, running: tuple[Tensor, Tensor]) -> None:
        """See `ds_lvx.kernels.interface.Kernel.fold`. The kernel that merges split keys does it."""
        if not problem.is_empty:
            _merge(*_parts(problem), *running, fold=True)

    def backward(
        self,
        problem: Problem,
        upstream: Upstream,
        *,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ds_lvx.kernels.interface.Kernel.backward`. dq in fp32."""
        if problem.is_empty:
            return no_gradients(problem, into, torch.float32)
        q, lse = problem.q, upstream.lse
        tensors = (q, problem.k, problem.v, upstream.dout.to(q.dtype))
        # In base 2; +inf where a row saw nothing, so that its weights are exp2(-inf) = 0.
        norm = (lse * math.log2(math.e)).masked_fill(lse == -torch.inf, torch.inf).contiguous()
        delta = upstream.delta.to(torch.float32).contiguous()
        inputs = (*map(_last_dim_dense, tensors), norm, delta)
        if self._atomic and (q.dtype != torch.float32 or q.shape[3] <= _ATOMIC_FP32):
            dq = _fp32(q.shape, q).zero_()
            return dq, *written(_keys_gradient(problem, inputs, into, dq=dq), into)
        dq = _queries_gradient(problem, inputs)
        return dq, *written(_keys_gradient(problem, inputs, into), into)


class TritonAtomicKernel(TritonKernel):
    """Backward in five products instead of seven: dq is added up by atomics.

    Its order, and so its last bits, may differ from run to run. In fp32 with a head_dim above 128
    it does seven, too.
    """

    name = "triton_atomic"
    _atomic = True


def _parts(problem: Problem) -> tuple[Tensor, Tensor]:
    """out ``[splits, B, S, H, D]`` and lse ``[splits, B, H, S]`` of every split, in fp32."""
    q, k, v = (_last_dim_dense(t) for t in (problem.q, problem.k, problem.v))
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_kv, kv_heads = k.shape[1:3]
    tiles = forward_tiles(q, k, capability(q))
    shape = shape_options(problem)
    numbers = count(seqlen_q * shape["GROUP"], tiles.rows), batch * kv_heads
    parts = splits(math.prod(numbers), count(seqlen_kv, tiles.keys), processors(q))
    out = _fp32((parts, batch, seqlen_q, heads, head_dim), q)
    lse = _fp32((parts, batch, heads, seqlen_q), q)
    triton_forward.forward_kernel[(numbers[0], parts, numbers[1])](
        q,
        k,
        v,
        out,
        lse,
        *_rule(problem, tiles),
        problem.softmax_scale * math.log2(math.e),
        seqlen_q,
        seqlen_kv,
        kv_heads,
        *_strides((q, k, v)),
        **shape,
        **tiles.options(),
    )
    return out, lse


def _queries_gradient(problem: Problem, inputs: tuple[Tensor, ...]) -> Tensor:
    q, k = inputs[:2]
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_kv, kv_heads = k.shape[1:3]
    tiles = queries_tiles(q, k, capability(q))
    shape = shape_options(problem)
    numbers = count(seqlen_q * shape["GROUP"], tiles.rows), batch * kv_heads
    parts = splits(math.prod(numbers), count(seqlen_kv, tiles.keys), processors(q))
    dq = _fp32((parts, batch, seqlen_q, heads, head_dim), q)
    triton_backward.queries_kernel[(numbers[0], parts, numbers[1])](
        *inputs,
        dq,
        *_rule(problem, tiles),
        *_scales(problem),
        seqlen_q,
        seqlen_kv,
        kv_heads,
        *_strides(inputs[:4]),
        **shape,
        **tiles.options(),
    )
    return dq[0] if parts == 1 else dq.sum(dim=0)


def _keys_gradient(
    problem: Problem,
    inputs: tuple[Tensor, ...],
    into: tuple[Tensor, Tensor] | None,
    *,
    dq: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dk and dv, written to where they are wanted if their last dimension is dense there; with
    ``dq`` its parts are added to it."""
    q, k = inputs[:2]
    batch, seqlen_kv, kv_heads, _ = k.shape
    choose = keys_tiles if dq is None else atomic_tiles
    tiles = choose(q, k, capability(q))
    dk, dv = (torch.empty_like(k), torch.empty_like(k)) if into is None else into
    dk, dv = (t if t.stride(-1) == 1 else torch.empty_like(k) for t in (dk, dv))
    triton_backward.keys_kernel[(count(seqlen_kv, tiles.keys), batch * kv_heads)](
        *inputs,
        dk,
        dv,
        inputs[4] if dq is None else dq,
        *_rule(problem, tiles, of_keys=True),
        *_scales(problem),
        q.shape[1],
        seqlen_kv,
        kv_heads,
        *_strides((*inputs[:4], dk, dv)),
        **shape_options(problem),
        **tiles.options(),
        ATOMIC=dq is not None,
    )
    return dk, dv


def _scales(problem: Problem) -> tuple[float, float]:
    return problem.softmax_scale, problem.softmax_scale * math.log2(math.e)


def _strides(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])


def _rule(problem: Problem, tiles: Tiles, *, of_keys: bool = False) -> tuple[Tensor | None, ...]:
    """Ranges, gaps or None, positions and the lists of what meets; where all see all, pointers
    nobody reads."""
    rule, q, k = problem.rule, problem.q, problem.k
    if rule is None:
        return q, q, None, None, q, q, q
    sees = rule.visibility
    group = q.shape[2] // k.shape[2]
    lists = rule.lists(rows=tiles.rows, keys=tiles.keys, group=group, of_keys=of_keys)
    given = (sees.q_start, sees.q_end, sees.gap_start, sees.gap_end, sees.kv_pos)
    return *(None if t is None else t.contiguous() for t in given), *lists


def _merge(parts: Tensor, lses: Tensor, out: Tensor, lse: Tensor, *, fold: bool) -> None:
    batch, seqlen_q, heads, head_dim = out.shape
    rows = batch * seqlen_q * heads
    triton_forward.merge_kernel[(count(rows, _ROWS_OF_A_MERGE),)](
        parts,
        lses,
        out,
        lse,
        rows,
        seqlen_q,
        heads,
        parts.shape[0],
        HEAD_DIM=head_dim,
        BLOCK_D=padded(head_dim),
        BLOCK_R=_ROWS_OF_A_MERGE,
        FOLD=fold,
    )


def _fp32(shape: Sequence[int], q: Tensor) -> Tensor:
    """Uninitialised, whatever the user's default dtype is."""
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _last_dim_dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
