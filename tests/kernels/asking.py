"""Asking a kernel by tensors: a `Problem` and an `Upstream` made of them."""

from __future__ import annotations

from torch import Tensor

from ds_lvx import Visibility
from ds_lvx.kernels.interface import Kernel, Problem, Upstream
from ds_lvx.kernels.rule import Rule


def problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visibility: Visibility | None,
    softmax_scale: float,
    partial: bool = False,
) -> Problem:
    """The problem of these tensors."""
    rule = None if visibility is None else Rule(visibility)
    return Problem(q, k, v, rule, softmax_scale=softmax_scale, partial=partial)


def forward(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visibility: Visibility | None,
    softmax_scale: float,
    partial: bool = False,
) -> tuple[Tensor, Tensor]:
    """``kernel.forward``."""
    asked = problem(q, k, v, visibility=visibility, softmax_scale=softmax_scale, partial=partial)
    return kernel.forward(asked)


def fold(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    running: tuple[Tensor, Tensor],
    *,
    visibility: Visibility | None,
    softmax_scale: float,
) -> None:
    """``kernel.fold``."""
    kernel.fold(problem(q, k, v, visibility=visibility, softmax_scale=softmax_scale), running)


def backward(
    kernel: Kernel,
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
    """``kernel.backward``."""
    asked = problem(q, k, v, visibility=visibility, softmax_scale=softmax_scale)
    return kernel.backward(asked, Upstream(dout, lse, delta, has_dlse), into=into)
