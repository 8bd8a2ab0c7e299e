"""The message of few queries that every rank holds: kept buffers, and what nobody sees."""

from __future__ import annotations

import pytest
import torch

import ds_lvx
from ds_lvx.attention.schedules.replicated import Parts
from ds_lvx.attention.witness import Witness
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.merge import merge
from tests.ranks import run_ranks

SHAPE = 2, 3, 4, 5  # B, S, H, D


def part(rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One rank's; the first row is seen by nobody, the second not by rank 0."""
    batch, seqlen, heads, head_dim = SHAPE
    generator = torch.Generator().manual_seed(100 * seed + rank)
    out = torch.randn(batch, seqlen, heads, head_dim, generator=generator)
    lse = 30 * torch.randn(batch, heads, seqlen, generator=generator)
    for row in (0,) if rank else (0, 1):
        out[:, row], lse[..., row] = 0.0, -torch.inf
    return out, lse


def run_two_calls(dtype: torch.dtype) -> int:
    """Bytes sent by a call; each is right, and the second changes nothing of the first."""
    channel, heard = Channel.world(), []
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    parts = Parts(channel, torch.empty(SHAPE, dtype=dtype), 2, seen=False)
    expected, found = [], []
    with ds_lvx.traffic() as counted:
        for seed in range(2):
            cast = [
                (o.to(dtype), lse.to(wide))
                for o, lse in (part(rank, seed) for rank in range(channel.size))
            ]
            expected.append(merge(cast, wide))
            numbers = torch.tensor([seed, channel.rank])
            witness = Witness(numbers, lambda said: heard.append(said.tolist()))
            found.append(parts.merged(*cast[channel.rank], witness))
            without = parts.merged(*cast[channel.rank], witness, wants_lse=False)[0]
            torch.testing.assert_close(without, found[-1][0], atol=0.0, rtol=0.0)
    for one, other in zip(found, expected, strict=True):
        for mine, whole in zip(one, other, strict=True):
            assert mine.dtype == wide
            torch.testing.assert_close(mine, whole)
    assert heard == [[[seed, rank] for rank in range(channel.size)] for seed in (0, 0, 1, 1)]
    assert counted.calls == 4
    return counted.bytes_sent // 4


@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_are_merged_from_buffers_that_calls_share(ranks: int) -> None:
    rows = 2 * 3 * 4
    nbytes = rows * 4 + rows * 5 * 4 + 16
    assert run_ranks(run_two_calls, ranks, torch.float32) == [(ranks - 1) * nbytes] * ranks
    assert len(run_ranks(run_two_calls, ranks, torch.bfloat16)) == ranks
