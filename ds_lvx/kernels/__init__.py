"""Who computes attention on one device: the kernel interface, and the choice of one."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from ds_lvx.kernels.native import NativeKernel
from ds_lvx.kernels.reference import ReferenceKernel
from ds_lvx.visibility import Visibility

KERNELS = ("auto", "native", "triton", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients through these keys, given the softmax over all keys of all ranks.

        Args:
            q, k, v, visibility, softmax_scale: as in `forward`.
            dout: ``[B, S, H, D]``.
            lse: ``[B, H, S]``, over all keys of all ranks.
            delta: ``[B, H, S]``, ``rowsum(dout * out) - dlse``.
            has_dlse: whether ``delta`` may hold a gradient of lse.

        Returns:
            A part of dq ``[B, S, H, D]`` in q's dtype or wider (parts of all ranks add up), and the
            exact dk and dv ``[B, T, K, D]``.
        """
        ...


def choose(name: str, q: Tensor) -> Kernel:
    """The kernel of this name for queries like ``q``; ``auto`` is ``native``.

    Raises:
        ValueError: an unknown name, or a dtype, head_dim or device that the kernel cannot do; names
            the kernels that can.
    """
    if name not in KERNELS:
        raise ValueError(f"kernel: got {name!r}; expected one of {list(KERNELS)}")
    if q.dtype not in DTYPES:
        expected = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(
            f"q, k, v: got {q.dtype}; expected one of {expected}; convert them with .to(...)"
        )
    if name == "triton":
        return _triton(q)
    return ReferenceKernel() if name == "reference" else NativeKernel()


def _triton(q: Tensor) -> Kernel:
    if find_spec("triton") is None:
        raise ValueError(
            "kernel: got 'triton', which is not installed; pip install triton (Linux), or use "
            "'native' or 'reference'"
        )
    # Here, not above: Triton takes a second to import, and decides then whether to interpret.
    from ds_lvx.kernels.triton_kernel import TritonKernel, problem

    found = problem(q)
    if found is not None:
        raise ValueError(f"kernel: got 'triton' for {found}; use 'native' or 'reference'")
    return TritonKernel()
