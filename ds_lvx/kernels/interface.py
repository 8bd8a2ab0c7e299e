"""The kernel interface: attention on one device."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ds_lvx.kernels.visibility import Visibility


class Kernel(Protocol):
    """Attention of some queries over the keys of one rank.

    Legend: B batch, S queries, T keys, H query heads, K key/value heads (K divides H), D head_dim.
    Lengths of 0 are allowed.
    """

    @property
    def name(self) -> str:
        """The kernel's name in the configuration."""
        ...

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
        """Attention over these keys alone.

        Args:
            q: ``[B, S, H, D]``, fp32, bf16, fp16 or fp64.
            k, v: ``[B, T, K, D]``, q's dtype.
            visibility: of these queries over these keys.
            softmax_scale: factor on the scores.
            partial: the result is a part that will be merged with others: a kernel that can do so
                at little cost returns ``out`` unrounded.

        Returns:
            ``out [B, S, H, D]`` in q's dtype or wider, ``lse [B, H, S]`` in fp32 (fp64 for fp64);
            ``(0, -inf)`` for a query that sees none of these keys.
        """
        ...

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
        """`forward`, merged in place into the result over other keys.

        Args:
            q, k, v, visibility, softmax_scale: as in `forward`.
            running: ``(out, lse)`` so far, in fp32 (fp64 for fp64); contiguous.
        """
        ...

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
        """Gradients through these keys, given the softmax over all keys of all ranks.

        Args:
            q, k, v, visibility, softmax_scale: as in `forward`.
            dout: ``[B, S, H, D]``.
            lse: ``[B, H, S]``, over all keys of all ranks.
            delta: ``[B, H, S]``, ``rowsum(dout * out) - dlse``.
            has_dlse: whether ``delta`` may hold a gradient of lse.
            into: tensors like k and v, of any strides, that dk and dv are to be written to.

        Returns:
            A part of dq ``[B, S, H, D]`` in q's dtype or wider (parts of all ranks add up), and the
            exact dk and dv ``[B, T, K, D]``: ``into`` itself where it was given.
        """
        ...


def written(
    gradients: tuple[Tensor, Tensor], into: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """dk and dv of a kernel that cannot write to given tensors, copied there if need be."""
    if into is None:
        return gradients
    for target, gradient in zip(into, gradients, strict=True):
        target.copy_(gradient)
    return into
