"""One attention call: the layout of its batch, and what its layer adds to it.

A patched model has a layout with its batch; that of a bare operator is made for its call
(`ds_lvx.attention.settle`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds_lvx.attention.layout import Layout
from ds_lvx.attention.order import Arrival
from ds_lvx.attention.shape import Hybrid
from ds_lvx.attention.witness import Witness
from ds_lvx.distributed.channel import Channel, ProcessGroup
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.kernels.interface import Kernel, Problem
from ds_lvx.kernels.rule import Rule

Group = ProcessGroup | SequenceParallelGroups | None


@dataclass(frozen=True)
class Call:
    """A call as all ranks agree on it; the same on all of them but for ``channel.rank``.

    Attributes:
        layout: who holds and who sees what.
        kernel: who computes a block.
        softmax_scale: factor on the scores.
        schedule: lvx's way to move queries, not ``auto`` any more; ignored by other methods.
        requires_grad: some rank needs a gradient, so every rank takes part in backward.
        returns_lse: lse is an output that may get a gradient of its own.
        wants_lse: somebody reads lse; else ``replicated`` may leave that of this rank's keys.
        witness: what travels with the parts of the schedule ``replicated``.
        hybrid: the subgroups inside which heads are split, if that is the method.
    """

    layout: Layout
    kernel: Kernel
    softmax_scale: float
    schedule: str = "gather"
    requires_grad: bool = False
    returns_lse: bool = False
    wants_lse: bool = True
    witness: Witness | None = None
    hybrid: Hybrid | None = None

    @property
    def channel(self) -> Channel:
        """The ranks that share the sequence."""
        return self.layout.channel

    @property
    def q_lengths(self) -> tuple[int, ...]:
        """Queries of every rank."""
        return self.layout.q_lengths

    @property
    def kv_lengths(self) -> tuple[int, ...]:
        """Keys of every rank."""
        return self.layout.kv_lengths

    def across(self, batch: int) -> tuple[Call, Arrival]:
        """The same call over a hybrid's subgroups: each is one rank, with some of the heads; and
        how tokens arrive there."""
        assert self.hybrid is not None
        layout, arrival = self.layout.across(self.hybrid, batch)
        return replace(self, layout=layout, hybrid=None), arrival

    def problem(
        self, q: Tensor, k: Tensor, v: Tensor, rule: Rule | None, *, partial: bool = False
    ) -> Problem:
        """What its kernel is asked for one block."""
        return Problem(q, k, v, rule, softmax_scale=self.softmax_scale, partial=partial)

    def anchor(self, device: torch.device) -> Tensor:
        """An input that makes the output of a Function require a gradient on every rank or on none.

        A rank whose own q, k and v need none would otherwise stay out of backward's collectives.
        """
        return torch.empty((), device=device, requires_grad=self.requires_grad)
