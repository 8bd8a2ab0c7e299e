"""`LVXAttention` beside DeepSpeed's own `DistributedAttention`: same calls, same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, nn

import ds_lvx
from ds_lvx.distributed.start import init_distributed
from tests.attention.cases import Problem
from tests.ranks import run_ranks


class PlainAttention(nn.Module):
    """The local attention that a user of DistributedAttention brings."""

    def __init__(self, batch_dim_idx: int) -> None:
        super().__init__()
        self.order = (0, 2, 1, 3) if batch_dim_idx == 0 else (1, 2, 0, 3)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads_first = [tensor.permute(self.order) for tensor in (query, key, value)]
        out = nn.functional.scaled_dot_product_attention(*heads_first, enable_gqa=True)
        back = (0, 2, 1, 3) if self.order[0] == 0 else (2, 0, 1, 3)
        return out.permute(back)


def run_both(batch_dim_idx: int, rotary: bool) -> list[list[Tensor]]:
    """out, dq, dk, dv of DeepSpeed's module and of ours, same inputs."""
    init_distributed(verbose=False)  # which DeepSpeed talks through
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    keys = 6 if rotary else 10
    problem = Problem((6, 6), (keys, keys))
    tables = None
    if rotary:
        angle = torch.outer(torch.arange(12.0), torch.rand(4, generator=torch.manual_seed(0)))
        angle = torch.cat((angle, angle), dim=-1)[None, :, None]
        tables = (angle.cos(), angle.sin())
    results = []
    for ours in (False, True):
        shard = problem.shard(rank)
        q, k, v, dout = (
            shard[n].detach().transpose(0, 1) if batch_dim_idx == 1 else shard[n].detach()
            for n in ("q", "k", "v", "dout")
        )
        leaves = [tensor.contiguous().requires_grad_() for tensor in (q, k, v)]
        module: Any
        if ours:
            module = ds_lvx.LVXAttention(None, group, 2, 1 - batch_dim_idx)
        else:
            local = PlainAttention(batch_dim_idx)
            module = DistributedAttention(local, group, 2, 1 - batch_dim_idx)
        out = module(*leaves, batch_dim_idx, tables)
        (out * dout).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    return results


# DeepSpeed applies rotary tables to a sequence-first layout only.
@pytest.mark.parametrize(("batch_dim_idx", "rotary"), [(0, False), (1, False), (1, True)])
def test_it_takes_the_place_of_deepspeeds_module(batch_dim_idx: int, rotary: bool) -> None:
    for theirs, ours in run_ranks(run_both, 2, batch_dim_idx, rotary):
        for one, other in zip(theirs, ours, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_what_it_cannot_do_is_an_error() -> None:
    q = torch.randn(1, 3, 2, 8)
    module = ds_lvx.LVXAttention()
    torch.testing.assert_close(module(q, q, q, 0), ds_lvx.lv_xattn(q, q, q))
    with pytest.raises(ValueError, match="batch_dim_idx: got 2; expected 0 or 1"):
        module(q, q, q, 2)
    with pytest.raises(NotImplementedError, match=r"attention_mask.*visibility="):
        module(q, q, q, 0, attention_mask=torch.ones(3, 3))
    with pytest.raises(NotImplementedError, match="argument 6"):
        module(q, q, q, 0, None, torch.ones(3, 3))
    assert module(q, q, q, 0, None, None, dropout=None).shape == q.shape
