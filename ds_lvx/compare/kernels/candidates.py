"""Who computes attention in the kernel benchmark: our kernels, PyTorch's backends, flash-attn.

Ours take a `Visibility`; the others take a dense mask, where they take any.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ds_lvx.kernels import Kernel, choose
from ds_lvx.kernels.auto import AutoKernel, kind_of, table_of
from ds_lvx.kernels.visibility import Visibility

SCORES_BYTES = 8 * 2**30
"""A candidate that would materialise more scores than this, in fp32, is left out."""

OURS = ("auto", "triton", "native")
BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
PACKAGES = {"flash-attn-3": "flash_attn_interface", "flash-attn-2": "flash_attn"}


class LeftOut(Exception):  # noqa: N818 - no fault: a decision that the record tells
    """This candidate is not tried on this case; says why."""


@dataclass(frozen=True)
class Inputs:
    """What every candidate gets.

    Attributes:
        q, dout: ``[1, S, H, D]``.
        k, v: ``[1, T, K, D]``.
        visibility: of these queries over these keys.
        scale: of the scores.
        lse, delta: ``[1, H, S]``, for a backward that is given them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    visibility: Visibility | None
    scale: float
    lse: Tensor
    delta: Tensor


class Candidate(Protocol):
    """One implementation on one case. `notes` say what is not part of its time."""

    notes: dict[str, Any]

    def forward(self) -> tuple[Tensor, ...]:
        """``out [1, S, H, D]``, and lse where it is told."""
        ...

    def backward(self) -> tuple[Tensor, ...]:
        """dq, dk, dv in the layout of q, k, v; the first call may do a forward before."""
        ...

    def by_key_head(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What `backward` returned, with dk and dv of the key/value heads, to be checked."""
        ...

    def active(self) -> AbstractContextManager[Any]:
        """Around all calls."""
        ...


class Ours:
    """One of our kernels. Its backward is given lse and delta, as on a rank."""

    def __init__(self, name: str, inputs: Inputs) -> None:
        self._inputs = inputs
        self._kernel: Kernel = choose(name, inputs.q)
        rule = "none" if inputs.visibility is None else "Visibility"
        self.notes: dict[str, Any] = {"mask": rule, "kv": "in place"}

    def forward(self) -> tuple[Tensor, ...]:
        """See `Candidate.forward`."""
        i = self._inputs
        return self._kernel.forward(i.q, i.k, i.v, visibility=i.visibility, softmax_scale=i.scale)

    def backward(self) -> tuple[Tensor, ...]:
        """See `Candidate.backward`."""
        i = self._inputs
        return self._kernel.backward(
            i.q,
            i.k,
            i.v,
            i.dout,
            i.lse,
            i.delta,
            visibility=i.visibility,
            softmax_scale=i.scale,
            has_dlse=False,
        )

    def by_key_head(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See `Candidate.by_key_head`."""
        return gradients

    def active(self) -> AbstractContextManager[Any]:
        """See `Candidate.active`."""
        return nullcontext()

    def chosen(self, direction: str) -> str:
        """The kernel that really computes; for ``auto`` after a call, from its table."""
        if not isinstance(self._kernel, AutoKernel):
            return self._kernel.name
        i = self._inputs
        options = {"visibility": i.visibility, "has_dlse": False}
        entry = table_of(i.q.device).entries().get(kind_of(direction, i.q, i.k, options))
        return "unknown: the table has no such kind" if entry is None else str(entry["chosen"])


class ByAutograd(ABC):
    """A function of q, k and v whose backward is autograd's."""

    def __init__(self, leaves: tuple[Tensor, ...], dout: Tensor) -> None:
        self._leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
        self._dout = dout
        self._out: Tensor | None = None
        self.notes: dict[str, Any] = {"mask": "none", "kv": "in place"}

    @abstractmethod
    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """out ``[1, S, H, D]``."""

    def forward(self) -> tuple[Tensor, ...]:
        """See `Candidate.forward`. With what it keeps for backward, as in training."""
        return (self._attend(*self._leaves),)

    def backward(self) -> tuple[Tensor, ...]:
        """See `Candidate.backward`."""
        if self._out is None:
            self._out = self._attend(*self._leaves)
        return torch.autograd.grad(self._out, self._leaves, self._dout, retain_graph=True)

    def by_key_head(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See `Candidate.by_key_head`."""
        return gradients

    def active(self) -> AbstractContextManager[Any]:
        """See `Candidate.active`."""
        return nullcontext()


class Sdpa(ByAutograd):
    """``scaled_dot_product_attention`` on one of its backends.

    q, k, v stay in ``[1, S, H, D]``, as models make them; PyTorch's layout is a view of it. Where
    the backend has no grouped heads, K and V are repeated beforehand.
    """

    def __init__(self, name: str, inputs: Inputs) -> None:
        self._backend = BACKENDS[name]
        self._group = inputs.q.shape[2] // inputs.k.shape[2]
        if name == "sdpa-math":
            _refuse_large_scores(inputs)
        self._mask = None
        mask = "none"
        if inputs.visibility is not None:
            self._mask, mask = inputs.visibility.mask()[:, None], "dense bool"
        self._scale = inputs.scale
        super().__init__((inputs.q, inputs.k, inputs.v), inputs.dout)
        self._in_place = self._group == 1 or self._groups_heads()
        if not self._in_place:
            k, v = (t.repeat_interleave(self._group, dim=2) for t in (inputs.k, inputs.v))
            super().__init__((inputs.q, k, v), inputs.dout)
        self.notes = {
            "mask": mask,
            "mask_bytes": 0 if self._mask is None else self._mask.numel(),
            "kv": "in place" if self._in_place else "repeated beforehand, which is not timed",
        }

    def by_key_head(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See `Candidate.by_key_head`. The sum over repeated heads is not timed either."""
        if self._in_place:
            return gradients
        dq, *others = gradients
        pairs = (t.unflatten(2, (-1, self._group)).float().sum(3) for t in others)
        return dq, *pairs

    @contextmanager
    def active(self) -> Iterator[Any]:
        """See `Candidate.active`."""
        with sdpa_kernel(self._backend):
            yield

    def _groups_heads(self) -> bool:
        """Whether the backend takes fewer heads of K and V, by trying."""
        try:
            with self.active(), catch_warnings():
                simplefilter("ignore")
                self.forward()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False
        return True

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=self._mask,
            scale=self._scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2)


class FlashAttn(ByAutograd):
    """The flash-attn package, where it is installed."""

    def __init__(self, name: str, inputs: Inputs) -> None:
        if inputs.visibility is not None:
            raise LeftOut("flash_attn_func takes no mask")
        super().__init__((inputs.q, inputs.k, inputs.v), inputs.dout)
        self._function = import_module(PACKAGES[name]).flash_attn_func
        self._scale = inputs.scale

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = self._function(q, k, v, softmax_scale=self._scale)
        return found[0] if isinstance(found, tuple) else found


def names() -> list[str]:
    """All candidates of this machine."""
    installed = [name for name, package in PACKAGES.items() if find_spec(package) is not None]
    return [*OURS, *installed, *BACKENDS]


def make(name: str, inputs: Inputs) -> Candidate:
    """A candidate on a case.

    Raises:
        LeftOut: it is not to be tried; why.
        Exception: whatever the implementation says that it cannot do.
    """
    if name in OURS:
        return Ours(name, inputs)
    return FlashAttn(name, inputs) if name in PACKAGES else Sdpa(name, inputs)


def _refuse_large_scores(inputs: Inputs) -> None:
    batch, queries, heads, _ = inputs.q.shape
    scores = 4 * batch * heads * queries * inputs.k.shape[1]
    if scores > SCORES_BYTES:
        raise LeftOut(
            f"would materialise {scores / 2**30:.0f} GiB of scores; the budget is "
            f"{SCORES_BYTES / 2**30:.0f} GiB"
        )
