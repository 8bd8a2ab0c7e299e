"""Many attentions side by side in one launch: FlashAttention of sequences of varying length.

Packed documents, and runs of queries that see a run of keys of their own, lie one after the other:
as one launch they fill a GPU that each of them alone would not. On a CPU, whose kernel has no such
launch, they are one call each.

Legend: N sequences, B batch, S queries, T keys, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ds_lvx.kernels import flash
from ds_lvx.kernels.cover import Sequences

_aten = torch.ops.aten


def forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, *, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each sequence's queries over its keys.

    Args:
        q: ``[B, S, H, D]``.
        k, v: ``[B, T, K, D]``.
        sequences: which together are all of q, k and v.
        softmax_scale: factor on the scores.

    Returns:
        ``out [B, S, H, D]`` in q's dtype and ``lse [B, H, S]`` in fp32 (fp64 for fp64).
    """
    rows = [_rows(t) for t in (q, k, v)]
    if q.device.type == "cpu":
        parts = [
            flash.forward(*each, causal=sequences.causal, softmax_scale=softmax_scale)
            for each in _one_by_one(rows, "qkk", sequences)
        ]
        out = torch.cat([each for each, _ in parts], dim=1)[0]
        lse = torch.cat([each for _, each in parts], dim=2)[0]
    else:
        lengths = (sequences.queries, sequences.keys, *sequences.longest)
        out, lse, *_ = _aten._flash_attention_forward(
            *rows, *lengths, 0.0, sequences.causal, False, scale=softmax_scale
        )
    return out.view(q.shape), lse.unflatten(1, q.shape[:2]).transpose(0, 1)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    *,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`, given the softmax over all keys of all ranks; in q's dtype.

    Args:
        q, k, v, sequences, softmax_scale: as in `forward`.
        dout, out: like q, and its dtype; ``out`` may be `ds_lvx.kernels.flash.stand_in`'s.
        lse: ``[B, S, H]``, finite.
    """
    rows = [_rows(t) for t in (q, k, v, dout, out)]
    by_row = lse.flatten(0, 1)
    if q.device.type == "cpu":
        parts = []
        for of_q, of_k, of_v, of_dout, of_out, norm in _one_by_one(
            [*rows, by_row], "qkkqqq", sequences
        ):
            own = flash.backward(
                of_q,
                of_k,
                of_v,
                of_dout,
                of_out,
                norm.transpose(1, 2).contiguous(),
                causal=sequences.causal,
                softmax_scale=softmax_scale,
            )
            parts.append(own)
        gradients = [torch.cat(each, dim=1)[0] for each in zip(*parts, strict=True)]
    else:
        q_rows, k_rows, v_rows, dout_rows, out_rows = rows
        seed, offset = flash.no_dropout(q.device)
        gradients = _aten._flash_attention_backward(
            dout_rows,
            q_rows,
            k_rows,
            v_rows,
            out_rows,
            by_row.t().contiguous(),
            sequences.queries,
            sequences.keys,
            *sequences.longest,
            0.0,
            sequences.causal,
            seed,
            offset,
            scale=softmax_scale,
        )
    dq, dk, dv = (t.view(like.shape) for t, like in zip(gradients, (q, k, v), strict=True))
    return dq, dk, dv


def _rows(tensor: Tensor) -> Tensor:
    """``[B, S, H, D]`` as ``[B * S, H, D]``, with the numbers of a head side by side."""
    dense = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return dense.flatten(0, 1)


def _one_by_one(rows: list[Tensor], kinds: str, sequences: Sequences) -> Iterator[list[Tensor]]:
    """Each sequence's part of every tensor, ``[1, length, ...]``."""
    bounds = {"q": sequences.queries.tolist(), "k": sequences.keys.tolist()}
    for number in range(len(sequences.queries) - 1):
        yield [
            tensor[bounds[kind][number] : bounds[kind][number + 1]][None]
            for tensor, kind in zip(rows, kinds, strict=True)
        ]
