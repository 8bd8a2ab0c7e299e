"""`gather_sequence`: whole sequences from shards of any length, with gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ds_lvx
from tests.ranks import RankError, run_ranks

LENGTHS = (3, 0, 2)


def gather(dim: int) -> tuple[Tensor, Tensor, Tensor]:
    rank = torch.distributed.get_rank()
    shape = [2, 2, 2]
    shape[dim] = LENGTHS[rank]
    x = torch.full(shape, float(rank)).requires_grad_()
    whole = ds_lvx.gather_sequence(x, dim)
    weights = torch.arange(whole.numel(), dtype=torch.float32).view(whole.shape) * (rank + 1)
    (whole * weights).sum().backward()
    ids = ds_lvx.gather_sequence(torch.full((1, LENGTHS[rank]), rank))
    assert x.grad is not None
    return whole.detach(), x.grad, ids


@pytest.mark.parametrize("dim", [1, 0, -1])
def test_every_rank_gets_the_whole_and_its_share_of_the_gradient(dim: int) -> None:
    answers = run_ranks(gather, 3, dim)
    shape = [2, 2, 2]
    shape[dim] = 5
    weights = torch.arange(20, dtype=torch.float32).view(shape) * (1 + 2 + 3)
    for (whole, gradient, ids), expected in zip(
        answers, weights.split(LENGTHS, dim=dim), strict=True
    ):
        owners = torch.tensor([0.0] * 3 + [2.0] * 2).view([5 if n == 5 else 1 for n in shape])
        assert torch.equal(whole, owners.expand(shape))
        assert torch.equal(gradient, expected)
        assert ids.tolist() == [[0, 0, 0, 2, 2]]


def gather_misshapen() -> None:
    rank = torch.distributed.get_rank()
    ds_lvx.gather_sequence(torch.zeros(2 + rank, 3))


def test_shapes_that_do_not_fit_are_everyones_error() -> None:
    with pytest.raises(RankError, match="disagree on other dimensions") as caught:
        run_ranks(gather_misshapen, 2)
    assert set(caught.value.errors) == {0, 1}
    with pytest.raises(ValueError, match="dim: got 3 for a tensor of 2"):
        ds_lvx.gather_sequence(torch.zeros(2, 2), 3)
