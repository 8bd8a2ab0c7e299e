"""Messages of rows: where each tensor lies, for one row as for many."""

from __future__ import annotations

import torch

from ds_lvx.distributed.bundles import Spec, pack_rows, unpack_rows


def test_one_row_lies_in_its_message_as_each_of_many_does() -> None:
    """Ranks with one row and with several are in one all-gather, whose rows have to be alike."""
    generator = torch.Generator().manual_seed(0)
    lse = torch.randn(2, 3, 5, generator=generator)  # rows in the last dimension, of 24 bytes
    out = torch.randn(5, 7, generator=generator)  # of 28
    numbers = torch.arange(5)[:, None]
    dims = [2, 0, 0]
    rows = pack_rows([lse, out, numbers], dims)
    assert rows.shape == (5, 32 + 32 + 16)
    for row in range(5):
        here = slice(row, row + 1)
        mine = [lse[:, :, here], out[here], numbers[here]]
        one = pack_rows(mine, dims)
        for at, nbytes in ((0, 24), (32, 28), (64, 8)):
            assert torch.equal(one[0, at : at + nbytes], rows[row, at : at + nbytes])
        found = unpack_rows(one, [Spec.of(each) for each in mine], dims)
        assert all(map(torch.equal, found, mine))


def test_a_single_element_may_have_any_stride() -> None:
    tensors = [torch.arange(10)[None][:, -1:], torch.zeros(1, 4)]
    assert tensors[0].stride() != (1, 1)
    found = unpack_rows(pack_rows(tensors, [0, 0]), [Spec.of(each) for each in tensors], [0, 0])
    assert all(map(torch.equal, found, tensors))
