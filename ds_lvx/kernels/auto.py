"""The ``auto`` kernel: by a tuned table where it has the kind of problem, else by rule.

The rule: FlashAttention where slices make up who sees what, else Triton's kernel, which takes any
rule, else ``native``. Nothing is measured here; ``ds-lvx doctor --tune`` does that, and writes the
table (`ds_lvx.kernels.table`).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ds_lvx.kernels.interface import Kernel, Problem, Upstream
from ds_lvx.kernels.table import Table, kind_of

BY_RULE = ("flash", "triton", "native")
"""The first that is there and serves a problem is taken; ``native`` serves all."""


class AutoKernel(Kernel):
    """One of some kernels, call by call.

    Args:
        candidates: by name; ``native`` among them.
        table: what was measured.
    """

    name = "auto"

    def __init__(self, candidates: Mapping[str, Kernel], table: Table) -> None:
        self._candidates = dict(candidates)
        self._table = table

    def choice(self, problem: Problem, upstream: Upstream | None = None) -> str:
        """The kernel that is taken: the table's, where it serves, or by rule.

        Args:
            problem: what is computed.
            upstream: in backward; None: forward.
        """
        entries = self._table.entries()
        tuned = entries.get(kind_of(problem, upstream)) if entries else None
        names = BY_RULE if tuned is None else (tuned["chosen"], *BY_RULE)
        able = (name for name in names if name in self._candidates)
        return next(name for name in able if self._candidates[name].serves(problem, upstream))

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """See `ds_lvx.kernels.interface.Kernel.forward`."""
        return self._candidates[self.choice(problem)].forward(problem)

    def fold(self, problem: Problem, running: tuple[Tensor, Tensor]) -> None:
        """See `ds_lvx.kernels.interface.Kernel.fold`; by the kernel of forward."""
        part = problem.as_part()
        self._candidates[self.choice(part)].fold(part, running)

    def backward(
        self,
        problem: Problem,
        upstream: Upstream,
        *,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ds_lvx.kernels.interface.Kernel.backward`."""
        kernel = self._candidates[self.choice(problem, upstream)]
        return kernel.backward(problem, upstream, into=into)
