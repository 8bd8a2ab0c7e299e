"""The oracle: attention over a whole sequence in one process, in float64, by autograd.

It shares no code with the kernels that it judges. Memory is O(S_q x S_kv).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_lvx.kernels.visibility import Visibility


def attention_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visibility: Visibility | None = None,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention with gradients.

    Args:
        q: ``[batch, seqlen_q, num_heads, head_dim]``, any floating dtype.
        k, v: ``[batch, seqlen_kv, num_kv_heads, head_dim]``.
        visibility: of the whole sequence; None is everything.
        softmax_scale: ``head_dim ** -0.5`` when None.

    Returns:
        float64 ``out [batch, seqlen_q, num_heads, head_dim]`` and ``lse [batch, num_heads,
        seqlen_q]``; a row that sees nothing is ``(0, -inf)`` with gradients 0.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    groups = q.shape[2] // k.shape[2]
    queries = q.double().transpose(1, 2)
    keys = k.double().transpose(1, 2).repeat_interleave(groups, dim=1)
    values = v.double().transpose(1, 2).repeat_interleave(groups, dim=1)
    scores = queries @ keys.transpose(-1, -2) * scale
    sees = torch.ones(scores.shape, dtype=torch.bool, device=q.device)
    if visibility is not None:
        position = visibility.kv_pos[:, None, None, :]
        start = visibility.q_start[:, None, :, None]
        end = visibility.q_end[:, None, :, None]
        sees = (position >= start) & (position < end)
        if visibility.gap_start is not None and visibility.gap_end is not None:
            behind = position >= visibility.gap_start[:, None, :, None]
            before = position < visibility.gap_end[:, None, :, None]
            sees = sees & ~(behind & before)
        sees = sees.expand_as(scores)
    blind = ~sees.any(dim=-1)
    # A blind row gets scores of 0, so that nothing is NaN in backward, and is blanked afterwards.
    scores = scores.masked_fill(~sees, -torch.inf).masked_fill(blind.unsqueeze(-1), 0.0)
    lse = torch.logsumexp(scores, dim=-1) if scores.shape[-1] else scores.sum(-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(blind.unsqueeze(-1), 0.0)
    out = (weights @ values).transpose(1, 2)
    return out, lse.masked_fill(blind, -torch.inf)
