"""16 bits on the wire: how much a part loses, and that nothing breaks at the ends of the range."""

from __future__ import annotations

import pytest
import torch

from ds_lvx.attention import wire
from ds_lvx.distributed.bundles import Spec


def sent(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    bundle = wire.encode(part, dtype)
    assert [Spec.of(tensor) for tensor in bundle] == wire.specs(tuple(part.shape), dtype)
    return wire.decode(bundle)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 3e4, 1e30])
def test_bf16_parts_keep_the_precision_of_fp16_at_any_size(size: float) -> None:
    part = torch.randn(3, 5, 2, 7, generator=torch.manual_seed(0)) * size
    error = ((sent(part, torch.bfloat16) - part) / part).abs().max().item()
    assert error <= 2**-11 * 1.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_dtypes_travel_as_they_are(dtype: torch.dtype) -> None:
    part = torch.randn(4, 3, 2, 2).to(dtype)
    assert torch.equal(sent(part, dtype), part)


def test_the_ends_of_the_range() -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.0, -1e-38]).view(1, 1, 7)
    back = sent(special, torch.bfloat16)
    torch.testing.assert_close(back, special, equal_nan=True, atol=1e-9, rtol=1e-3)
    assert torch.equal(sent(torch.zeros(3, 1, 2), torch.bfloat16), torch.zeros(3, 1, 2))
    assert sent(torch.zeros(2, 0, 4), torch.bfloat16).shape == (2, 0, 4)
    largest = torch.tensor([[[torch.finfo(torch.bfloat16).max, 1.0]]])
    assert sent(largest, torch.bfloat16)[0, 0, 0] == largest[0, 0, 0]


def test_a_row_of_small_numbers_keeps_them_beside_a_row_of_large_ones() -> None:
    part = torch.stack((torch.full((2, 8), 1e-20), torch.full((2, 8), 1e20)))
    torch.testing.assert_close(sent(part, torch.bfloat16), part, rtol=2**-11, atol=0)
