"""How parts of a result travel: in 16 bits where q has 16 bits, but as precisely as those allow.

A part that is merged elsewhere is rounded once on the way and once more after the merge. In bf16,
with its 8 significant bits, the two together can exceed twice the error of attention in one piece.
fp16 has 11; what it lacks is range, which one power of two a row gives back. Both factors are
exact. A value smaller than the largest of its row by 2^-29 or more loses bits again.

A row is what belongs to one token of one sample: ``[num_heads, head_dim]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_lvx.distributed.bundles import Bundle, Spec, Unwritten
from ds_lvx.kernels.late_triton import launches_triton, triton_parts
from ds_lvx.kernels.merge import accumulation_dtype, merge_stacked

_FP16_EXPONENT = 15  # the largest fp16 is just below 2^16


def encode(part: Tensor, dtype: torch.dtype) -> Bundle:
    """The tensors to send for ``part``, a tensor of a shape that the receiver knows.

    Args:
        part: fp32 or fp64, or ``dtype``; ``[..., num_heads, head_dim]``.
        dtype: q's dtype, which decides the number of bits.
    """
    if dtype != torch.bfloat16:
        return [part.to(dtype)]
    if launches_triton(part):
        bundle = [spec.empty(part.device) for spec in specs(tuple(part.shape), dtype)]
        triton_parts().encode(part, *bundle)
        return bundle
    wide = part.to(torch.float32)
    scale = _scale(wide)
    return [(wide * scale[..., None, None]).to(torch.float16), scale.reciprocal()]


def to_send(part: Tensor, dtype: torch.dtype, lse: Tensor | None = None) -> Unwritten:
    """`encode`'s tensors, behind ``lse`` where it is given, to be written into their message."""

    statistics = [] if lse is None else [Spec.of(lse)]

    def write(into: Bundle) -> None:
        if lse is not None:
            into[0].copy_(lse)
        encoded = into[len(statistics) :]
        if len(encoded) == 1:
            encoded[0].copy_(part)
        elif launches_triton(part):
            triton_parts().encode(part, *encoded)
        else:
            for view, tensor in zip(encoded, encode(part, dtype), strict=True):
                view.copy_(tensor)

    return Unwritten([*statistics, *specs(tuple(part.shape), dtype)], part.device, write)


def specs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Spec]:
    """The specs of `encode`'s tensors for a part of this shape."""
    if dtype != torch.bfloat16:
        return [Spec(shape, dtype)]
    return [Spec(shape, torch.float16), Spec(shape[:-2], torch.float32)]


def decode(bundle: Bundle) -> Tensor:
    """The part that arrived, in fp32 where it was scaled."""
    if len(bundle) == 1:
        return bundle[0]
    part, factor = bundle
    return part * factor[..., None, None]  # in fp32, as the factor


def joined(
    arrived: Bundle, own: Tensor, mine: int, lse: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Parts over the keys of all ranks together, in fp32 (fp64 for fp64).

    Args:
        arrived: `encode`'s tensors of every rank, ``[n, batch, seqlen, num_heads, head_dim]`` and
            ``[n, batch, seqlen]``.
        own: this rank's part as it is, unrounded; it takes the place of the one that arrived.
        mine: that place.
        lse: ``[n, batch, num_heads, seqlen]``: merge by it; None: add up.
    """
    dtype = accumulation_dtype(arrived[0].dtype)
    if launches_triton(own) and dtype == torch.float32:
        factors = arrived[1] if len(arrived) > 1 else None
        out, total = triton_parts().join(arrived[0], factors, lse, own, mine)
        return out, total
    parts = decode(arrived).to(dtype)
    parts[mine] = own
    if lse is None:
        return parts.sum(dim=0), None
    return merge_stacked(parts, lse.to(dtype))


def _scale(part: Tensor) -> Tensor:
    """fp32, one a row: the power of two that brings its largest finite value into [2^14, 2^15)."""
    if part.numel() == 0:
        return part.new_ones(part.shape[:-2])
    largest = torch.nan_to_num(part, nan=0.0, posinf=0.0, neginf=0.0).abs().amax(dim=(-2, -1))
    _, exponent = torch.frexp(largest)
    # Between 2^-120 and 2^120 the factor and its reciprocal are both normal numbers.
    exponent = (_FP16_EXPONENT - exponent).clamp(-120, 120)
    return torch.ldexp(torch.ones_like(largest), exponent)
