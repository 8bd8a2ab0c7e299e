"""The kernel interface: attention on one device."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ds_lvx.kernels.cover import Cover
from ds_lvx.kernels.merge import merge_
from ds_lvx.kernels.rule import Rule


@dataclass(frozen=True, eq=False)
class Problem:
    """Attention of some queries over the keys of one rank: what a kernel is asked for.

    Legend: B batch, S queries, T keys, H query heads, K key/value heads (K divides H), D head_dim.
    Lengths of 0 are allowed.

    Attributes:
        q: ``[B, S, H, D]``, fp32, bf16, fp16 or fp64.
        k, v: ``[B, T, K, D]``, q's dtype.
        rule: of these queries over these keys; None where all see all.
        softmax_scale: factor on the scores.
        partial: the result will be merged with others: a kernel that can do so at little cost
            returns ``out`` unrounded.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rule: Rule | None = None
    softmax_scale: float = field(kw_only=True)
    partial: bool = field(default=False, kw_only=True)

    @property
    def is_empty(self) -> bool:
        """No query or no key."""
        return self.q.numel() == 0 or self.k.numel() == 0

    @cached_property
    def cover(self) -> Cover | None:
        """What is visible in slices; None where too many; see `ds_lvx.kernels.rule.Rule.cover`."""
        if self.rule is not None and not self.is_empty:
            return self.rule.cover
        batch, seqlen_q = self.q.shape[:2]
        return Cover.of_all(batch, seqlen_q, self.k.shape[1])

    def as_part(self) -> Problem:
        """The same, to be merged with others."""
        return self if self.partial else replace(self, partial=True)


@dataclass(frozen=True, eq=False)
class Upstream:
    """What comes from above in backward, given the softmax over all keys of all ranks.

    Attributes:
        dout: ``[B, S, H, D]``.
        lse: ``[B, H, S]``, over all keys of all ranks.
        delta: ``[B, H, S]``, ``rowsum(dout * out) - dlse``.
        has_dlse: whether ``delta`` may hold a gradient of lse.
    """

    dout: Tensor
    lse: Tensor
    delta: Tensor
    has_dlse: bool = False


class Kernel(Protocol):
    """Computes a `Problem`, forward and backward."""

    @property
    def name(self) -> str:
        """The kernel's name in the configuration."""
        ...

    def serves(self, problem: Problem, upstream: Upstream | None = None) -> bool:
        """Whether it is made for a problem; it computes the others too, by the help of another.

        Args:
            problem, upstream: what it is asked; without ``upstream`` in forward.
        """
        return True

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Attention over these keys alone.

        Returns:
            ``out [B, S, H, D]`` in q's dtype or wider, ``lse [B, H, S]`` in fp32 (fp64 for fp64);
            ``(0, -inf)`` for a query that sees none of these keys.
        """
        ...

    def fold(self, problem: Problem, running: tuple[Tensor, Tensor]) -> None:
        """`forward`, merged in place into the result over other keys.

        Args:
            problem: these keys.
            running: ``(out, lse)`` so far, in fp32 (fp64 for fp64); contiguous.
        """
        merge_(*running, *self.forward(problem.as_part()))

    def backward(
        self,
        problem: Problem,
        upstream: Upstream,
        *,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients through these keys.

        Args:
            problem, upstream: what forward was asked, and what comes from above.
            into: tensors like k and v, of any strides, that dk and dv are to be written to.

        Returns:
            A part of dq ``[B, S, H, D]`` in q's dtype or wider (parts of all ranks add up), and the
            exact dk and dv ``[B, T, K, D]``: ``into`` itself where it was given.
        """
        ...


def written(
    gradients: tuple[Tensor, Tensor], into: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """dk and dv, copied to given tensors where the kernel has not written them there."""
    if into is None:
        return gradients
    for target, gradient in zip(into, gradients, strict=True):
        if gradient is not target:
            target.copy_(gradient)
    return into


def no_gradients(
    problem: Problem, into: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The zeros of an empty problem; dq in ``dtype``."""
    q, k, v = problem.q, problem.k, problem.v
    nothing = (torch.zeros_like(k), torch.zeros_like(v))
    return torch.zeros(q.shape, dtype=dtype, device=q.device), *written(nothing, into)
