"""What travels under lvx: rows of queries on their way out, parts of a result on their way home.

Shapes of what arrives follow from the settled `Call` and from this rank's own tensors, which may be
those of some heads only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_lvx.attention import wire
from ds_lvx.attention.call import Call
from ds_lvx.attention.keys import Saved
from ds_lvx.bundles import Bundle, Spec
from ds_lvx.visibility import Visibility


def ranges(visibility: Visibility | None) -> Bundle:
    """The visibility of queries, as it travels with them."""
    return [] if visibility is None else [visibility.ranges]


def query_specs(call: Call, q: Tensor, visibility: Visibility | None, rank: int) -> list[Spec]:
    """What another rank's queries look like."""
    queries = _rows_like(q, call.q_lengths[rank], dim=1)
    return [queries, *_range_specs(call, q, visibility, rank)]


def gradient_specs(
    call: Call, saved: Saved, visibility: Visibility | None, rank: int
) -> list[Spec]:
    """What another rank's queries look like in backward, with dout, lse and delta."""
    length = call.q_lengths[rank]
    queries = _rows_like(saved.q, length, dim=1)
    statistics = [_rows_like(saved.lse, length, dim=2), _rows_like(saved.delta, length, dim=2)]
    return [queries, queries, *statistics, *_range_specs(call, saved.q, visibility, rank)]


def encode_part(out: Tensor, lse: Tensor, dtype: torch.dtype) -> Bundle:
    """A part on its way home."""
    return [lse, *wire.encode(out, dtype)]


def part_specs(out: Tensor, lse: Tensor, dtype: torch.dtype) -> list[Spec]:
    """What a part of this rank's own rows looks like on its way home.

    Args:
        out, lse: of the same rows and heads.
        dtype: q's.
    """
    return [Spec.of(lse), *wire.specs(tuple(out.shape), dtype)]


def decode_part(bundle: Bundle) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of a part that arrived."""
    return wire.decode(bundle[1:]), bundle[0]


def _rows_like(tensor: Tensor, length: int, *, dim: int) -> Spec:
    shape = list(tensor.shape)
    shape[dim] = length
    return Spec(tuple(shape), tensor.dtype)


def _range_specs(call: Call, q: Tensor, visibility: Visibility | None, rank: int) -> list[Spec]:
    if visibility is None:
        return []
    return [Spec((2, q.shape[0], call.q_lengths[rank]), torch.int32)]
