"""The schedules of lvx: how queries meet the keys of every rank while the keys stay at home.

A schedule is a pair of functions. Both take this rank's keys as `Keys`, and call ``prepare`` once
the first transfer is under way, so that a projection which it runs hides that transfer. Backward
calls ``finish`` while the last transfer of dq is under way, for the same reason. A new one is a
file here and a row in `ds_lvx.config.registry`.

Legend: n ranks, s this rank's queries, H heads, D head_dim, e bytes an element. Forward sends
``(n - 1) s H (2 D e + 4)`` bytes a rank, backward ``(n - 1) s H (3 D e + 8)``, in ``ring`` and in
``gather`` alike (LV-XAttn, arXiv:2502.02406, section 3).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ds_lvx.attention.call import Call
from ds_lvx.attention.keys import Keys, Saved
from ds_lvx.config.registry import SCHEDULES


class Schedule(Protocol):
    """Moves queries. Stateless."""

    def forward(self, call: Call, q: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` of this rank's queries over all ranks' keys, both in fp32; of a group of
        one as the kernel makes them."""
        ...

    def backward(self, call: Call, saved: Saved, keys: Keys) -> Tensor:
        """dq of this rank's queries, in fp32."""
        ...


def schedule_of(call: Call) -> Schedule:
    """The schedule of a call."""
    schedule: Schedule = SCHEDULES[call.schedule].load()()
    return schedule
