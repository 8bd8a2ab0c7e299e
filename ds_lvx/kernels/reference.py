"""The ``reference`` kernel: float64 over all keys of a rank at once. For checks, not for speed."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_lvx.kernels import dense
from ds_lvx.kernels.interface import written
from ds_lvx.kernels.merge import accumulation_dtype, empty_part, merge_
from ds_lvx.kernels.visibility import Visibility


class ReferenceKernel:
    """Dense attention in float64; memory is O(S_q x S_kv). Stateless."""

    name = "reference"

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        visibility: Visibility | None,
        softmax_scale: float,
        partial: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See `ds_lvx.kernels.Kernel.forward`; nothing is rounded to 16 bits here anyway."""
        del partial
        dtype = accumulation_dtype(q.dtype)
        if k.numel() == 0:
            return empty_part(q, dtype)
        mask = None if visibility is None else visibility.mask()
        out, lse = dense.forward(
            q, k, v, mask=mask, softmax_scale=softmax_scale, dtype=torch.float64
        )
        return out.to(dtype), lse.to(dtype)

    def fold(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        running: tuple[Tensor, Tensor],
        *,
        visibility: Visibility | None,
        softmax_scale: float,
    ) -> None:
        """See `ds_lvx.kernels.Kernel.fold`."""
        part = self.forward(q, k, v, visibility=visibility, softmax_scale=softmax_scale)
        merge_(*running, *part)

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dout: Tensor,
        lse: Tensor,
        delta: Tensor,
        *,
        visibility: Visibility | None,
        softmax_scale: float,
        has_dlse: bool,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ds_lvx.kernels.Kernel.backward`; a gradient of lse is nothing special here."""
        del has_dlse
        if k.numel() == 0:
            return torch.zeros_like(q), *written((torch.zeros_like(k), torch.zeros_like(v)), into)
        mask = None if visibility is None else visibility.mask()
        dq, dk, dv = dense.backward(
            q,
            k,
            v,
            dout,
            lse,
            delta,
            mask=mask,
            softmax_scale=softmax_scale,
            dtype=torch.float64,
        )
        return dq.to(accumulation_dtype(q.dtype)), *written((dk.to(k.dtype), dv.to(v.dtype)), into)
