"""What a step's kernels take without any communication: its calls are noted, and repeated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ds_lvx.distributed.bundles import Spec
from ds_lvx.kernels import Kernel
from ds_lvx.kernels.visibility import Visibility


@dataclass(frozen=True)
class KernelCall:
    """One call: the kernel's function, and its arguments."""

    function: str
    tensors: tuple[Tensor, ...]
    options: dict[str, Any]


class NotingKernel:
    """A kernel that also notes its calls.

    Of tensors that look alike only the first is kept, for all of them: a time does not depend on
    the values, and the shards of all ranks need not fit in one.

    Args:
        kernel: who computes.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.calls: list[KernelCall] = []
        self._kernel = kernel
        self._kept: dict[tuple[int, Spec], Tensor] = {}

    @property
    def name(self) -> str:
        """See `ds_lvx.kernels.Kernel.name`."""
        return self._kernel.name

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
        """See `ds_lvx.kernels.Kernel.forward`."""
        options: dict[str, Any] = {
            "visibility": visibility,
            "softmax_scale": softmax_scale,
            "partial": partial,
        }
        self._note("forward", (q, k, v), options)
        return self._kernel.forward(q, k, v, **options)

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
        options: dict[str, Any] = {"visibility": visibility, "softmax_scale": softmax_scale}
        # The running result changes: what is noted must be nobody's but ours.
        self._note("fold", (q, k, v, running[0].clone(), running[1].clone()), options)
        self._kernel.fold(q, k, v, running, **options)

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
        """See `ds_lvx.kernels.Kernel.backward`."""
        options: dict[str, Any] = {
            "visibility": visibility,
            "softmax_scale": softmax_scale,
            "has_dlse": has_dlse,
        }
        tensors = (q, k, v, dout, lse, delta)
        # Again it is to write to new memory, as a step does; what was written before is at hand.
        self._note("backward", tensors, options)
        return self._kernel.backward(*tensors, **options, into=into)

    def repeat(self, first: int, last: int) -> None:
        """Make calls ``first`` to ``last`` again, the last one excluded."""
        for call in self.calls[first:last]:
            tensors: tuple[Any, ...] = call.tensors
            if call.function == "fold":
                tensors = (*tensors[:3], tensors[3:])
            getattr(self._kernel, call.function)(*tensors, **call.options)

    def _note(self, function: str, tensors: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        kept = tuple(
            self._kept.setdefault((place, Spec.of(tensor)), tensor.detach())
            for place, tensor in enumerate(tensors)
        )
        self.calls.append(KernelCall(function, kept, options))
